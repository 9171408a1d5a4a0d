"""A vocabulary sharded over two processes gives the unsharded float64 truth, forward and backward."""

import os

import torch
import torch._dynamo  # a custom operator imports it; were that after init_process_group, it would keep the group alive
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from aligner import ops

N, H, V, TEMPERATURE = 23, 17, 94, 0.7


def case(scale):
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    mask = torch.rand(N, generator=generator) < 0.7
    return hidden, weight, targets, mask, torch.randn(2, N, generator=generator)


def gradients(outputs, g, inputs):
    return torch.autograd.grad((outputs[0] * g[0]).sum() + (outputs[1] * g[1]).sum(), inputs)


def truth(hidden, weight, targets, mask, g):
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z = hidden @ weight.T / TEMPERATURE
    z.retain_grad()
    log_p = z - z.logsumexp(1, keepdim=True)
    logprobs = log_p[torch.arange(N), targets] * mask
    entropy = -(log_p.exp() * log_p).sum(1) * mask
    d_hidden, d_weight, d_z = gradients((logprobs, entropy), g, (hidden, weight, z))
    return logprobs, entropy, d_hidden, d_weight, d_z / TEMPERATURE


def close(got, want, scale):
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4 if scale == 1 else 2e-3, atol=2e-4 * scale)


def linear_logprobs(rank, impl, scale):
    hidden, weight, targets, mask, g = case(scale)
    want = truth(hidden, weight, targets, mask, g)
    shard = slice(rank * V // 2, (rank + 1) * V // 2)
    hidden[~mask] = torch.nan
    hidden, weight = hidden.requires_grad_(), weight[shard].clone().requires_grad_()
    outputs = ops.linear_logprobs(
        hidden, weight, targets, mask_N=mask, temperature=TEMPERATURE, group=dist.group.WORLD, impl=impl
    )
    got = (*outputs, *gradients(outputs, g, (hidden, weight)))
    for a, b in zip(got, (*want[:3], want[3][shard]), strict=True):
        close(a, b, scale)


def logprobs(rank, impl, scale, inplace=False):
    hidden, weight, targets, mask, g = case(scale)
    want = truth(hidden, weight, targets, torch.ones(N), g)
    shard = slice(rank * V // 2, (rank + 1) * V // 2)
    logits = (hidden @ weight.T)[:, shard].clone().requires_grad_()
    outputs = ops.logprobs(
        logits * 1, targets, temperature=TEMPERATURE, group=dist.group.WORLD, inplace_backward=inplace, impl=impl
    )
    for a, b in zip((*outputs, *gradients(outputs, g, logits)), (*want[:2], want[4][:, shard]), strict=True):
        close(a, b, scale)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


def equals_one_process(rank, op, impl):
    """To 1e-6 what one process gets, and no tensor on the way is larger than the shard of weight or of logits."""
    generator = torch.Generator().manual_seed(2)
    n, h, v = 64, 8, 4096
    hidden, weight = torch.randn(n, h, generator=generator), torch.randn(v, h, generator=generator)
    targets = torch.randint(0, v, (n,), generator=generator)
    g = torch.randn(2, n, generator=generator)
    shard = slice(rank * v // 2, (rank + 1) * v // 2)
    if op is ops.linear_logprobs:
        whole, mine = (hidden, weight), (hidden.clone(), weight[shard].clone())
    else:
        logits = hidden @ weight.T
        whole, mine = (logits,), (logits[:, shard].clone(),)
    whole, mine = [[x.requires_grad_() for x in inputs] for inputs in (whole, mine)]
    outputs = op(*whole, targets, impl=impl)
    want = [*outputs, *gradients(outputs, g, whole)]
    with Largest() as largest:
        outputs = op(*mine, targets, group=dist.group.WORLD, impl=impl)
        got = [*outputs, *gradients(outputs, g, mine)]
    want[-1] = want[-1][shard] if op is ops.linear_logprobs else want[-1][:, shard]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert 0 < largest.elements <= v // 2 * (h if op is ops.linear_logprobs else n)


def empty_shard(rank):
    """Rank 1 holds nothing but -inf logits, as where a tokenizer's padding is masked out."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 8, generator=generator)
    logits[:, 4:] = -torch.inf
    targets = torch.tensor([0, 3, 2, 1, 1])
    log_p = logits.double().log_softmax(1)[:, :4]
    got = ops.logprobs(logits[:, 4 * rank : 4 * rank + 4], targets, group=dist.group.WORLD, impl="cpp")
    torch.testing.assert_close(got[0].double(), log_p[torch.arange(5), targets], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), -(log_p.exp() * log_p).sum(1), rtol=1e-6, atol=1e-6)


def whiten(rank, impl):
    x, mask = 100 + torch.arange(40.0).square(), torch.arange(40) % 3 > 0
    kept = x[mask].double()
    want = torch.where(mask, (x.double() - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt(), 0)
    part = slice(0, 11) if rank == 0 else slice(11, 40)
    got = ops.whiten(x[part], mask[part], group=dist.group.WORLD, impl=impl)
    torch.testing.assert_close(got.double(), want[part], rtol=1e-5, atol=1e-5)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for impl in ("reference", "cpp"):
        for scale in (1.0, 1e3):
            linear_logprobs(rank, impl, scale)
            logprobs(rank, impl, scale)
        whiten(rank, impl)
    if not torch.cuda.is_available():  # in Triton's interpreter, see tests/conftest.py
        for scale in (1.0, 1e3):
            linear_logprobs(rank, "triton", scale)
    logprobs(rank, "cpp", 1.0, inplace=True)
    empty_shard(rank)
    for op in (ops.linear_logprobs, ops.logprobs):
        equals_one_process(rank, op, "cpp")
    dist.destroy_process_group()


def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
