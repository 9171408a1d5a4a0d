"""Operators as a loss uses them: compiled in one graph, and differentiated in float64."""

import subprocess
import sys

import pytest
import torch

from aligner import ops


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(30, 8, generator=generator)
    targets = torch.randint(0, 30, (12,), generator=generator)
    cu_seqlens = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, cu_seqlens


def loss(hidden, weight, targets, cu_seqlens, impl="auto"):
    """Log-probabilities, PPO's loss on them, and a mean over sequences."""
    dtype = hidden.dtype
    old = torch.linspace(-4, -3, len(hidden), dtype=dtype)
    advantages = torch.linspace(-1, 1, len(hidden), dtype=dtype)
    mask = torch.arange(len(hidden)) % 3 != 0
    logprobs, entropy = ops.linear_logprobs(hidden, weight, targets, mask_N=mask, temperature=0.7, impl=impl)
    clip = dict(clip_low=0.2, clip_high=0.3, entropy_coef=0.1, ref_logprobs_N=old - 0.1, kl_coef=0.2)
    policy, stats = ops.policy_loss(logprobs, old, advantages, mask, 8.0, entropy_N=entropy, impl=impl, **clip)
    return policy + 0.1 * ops.segment_mean(logprobs, cu_seqlens, mask_N=mask, impl=impl).sum(), stats["kl"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_three_operators_in_one_graph(backend):
    hidden, weight, *rest = inputs()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    got, want = (f(hidden, weight, *rest) for f in (compiled, loss))
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x[0], (hidden, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_references_in_float64():
    hidden, weight, *rest = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: loss(h, w, *rest, impl="reference")[0], (hidden, weight))


def test_logprobs_and_value_loss_in_float64():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 9, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.tensor([0, 3, 8, 8])
    assert torch.autograd.gradcheck(lambda x: ops.logprobs(x, targets, temperature=1.3, impl="reference"), (logits,))
    values, old, returns = torch.randn(3, 9, dtype=torch.float64, generator=generator)
    mask = torch.ones(9, dtype=torch.bool)
    for clip, huber in ((None, None), (0.3, None), (0.3, 0.5)):
        assert torch.autograd.gradcheck(
            lambda v, c=clip, h=huber: ops.value_loss(v, old, returns, mask, 9.0, clip=c, huber=h)[0],
            (values.requires_grad_(),),
        )


@pytest.mark.parametrize("impl", ["cpp", "cuda"])
def test_impl_by_name(emulated_cuda, impl):
    ops.cpu_isa("emulated-cuda" if impl == "cuda" else "")
    try:
        x, cu_seqlens = torch.randn(12), torch.tensor([0, 5, 12], dtype=torch.int32)
        torch.testing.assert_close(ops.segment_sum(x, cu_seqlens, impl=impl), torch.stack([x[:5].sum(), x[5:].sum()]))
    finally:
        ops.cpu_isa("")


def test_cuda_kernels_that_are_not_built():
    code = "import torch; from aligner import ops; ops.cpu_isa('emulated-cuda'); "
    code += "ops.whiten(torch.ones(3), torch.ones(3, dtype=torch.bool), impl='cuda')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "whiten: impl cuda needs the CUDA kernels, which this build does not have; build with nvcc" in done.stderr
