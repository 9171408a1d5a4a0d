import pytest
import torch
from three_way import assert_three_way

from aligner import ops

LENGTHS = [[], [0], [1], [7], [3, 0, 5], [0, 0, 4, 0], [257, 64, 1, 0, 1000]]


def case(lengths, action=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    n = sum(lengths)
    rewards, values = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    mask = torch.rand(n, generator=generator) < action
    rewards[~mask], values[~mask] = torch.nan, torch.nan
    return rewards, values, mask, cu_seqlens


def by_definition(rewards, values, mask, cu_seqlens, gamma, lam):
    """The sum of the definition, O(length^2), over the action tokens alone."""
    advantages = torch.zeros(len(rewards), dtype=torch.float64)
    for b in range(len(cu_seqlens) - 1):
        at = [t for t in range(cu_seqlens[b], cu_seqlens[b + 1]) if mask[t]]
        r, v = rewards[at].double(), torch.cat([values[at].double(), torch.zeros(1, dtype=torch.float64)])
        delta = r + gamma * v[1:] - v[:-1]
        for i, t in enumerate(at):
            powers = (gamma * lam) ** torch.arange(len(at) - i, dtype=torch.float64)
            advantages[t] = (powers * delta[i:]).sum()
    return advantages, torch.where(mask, advantages + values.double(), 0)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.99, 1.0), (1.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("action", [0.7, 0.0, 1.0])
def test_three_way(isa, lengths, gamma, lam, action):
    rewards, values, mask, cu_seqlens = case(lengths, action)
    truth = by_definition(rewards, values, mask, cu_seqlens, gamma, lam)
    eager = ops.gae(rewards, values, mask, cu_seqlens, gamma=gamma, lam=lam, impl="reference")
    kernel = ops.gae(rewards, values, mask, cu_seqlens, gamma=gamma, lam=lam, impl="cpp")
    for name, t, e, k in zip(("advantages", "returns"), truth, eager, kernel, strict=True):
        assert_three_way(t, e, k, epsilon=2e-6, what=name)


def test_reference_matches_definition_in_float64():
    rewards, values, mask, cu_seqlens = case([5, 0, 30])
    truth = by_definition(rewards, values, mask, cu_seqlens, 0.9, 0.8)
    got = ops.gae(rewards.double(), values.double(), mask, cu_seqlens, gamma=0.9, lam=0.8)
    for t, g in zip(truth, got, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-12)


def test_skips_tool_tokens(isa):
    # Two actions around a token that is none: the same as the two alone.
    rewards, values = torch.tensor([1.0, 9.0, 2.0]), torch.tensor([0.5, 9.0, 0.25])
    mask = torch.tensor([True, False, True])
    advantages, returns = ops.gae(
        rewards, values, mask, torch.tensor([0, 3], dtype=torch.int32), gamma=0.5, lam=0.5, impl="cpp"
    )
    second = 2.0 - 0.25
    first = 1.0 + 0.5 * 0.25 - 0.5 + 0.25 * second
    torch.testing.assert_close(advantages, torch.tensor([first, 0.0, second]))
    torch.testing.assert_close(returns, torch.tensor([first + 0.5, 0.0, second + 0.25]))


def test_non_contiguous_and_detached():
    rewards, values, mask, cu_seqlens = case([9, 4], action=1.0)
    wide = torch.stack([rewards, values], dim=1).requires_grad_()
    got = ops.gae(wide[:, 0], wide[:, 1], mask, cu_seqlens, gamma=1.0, lam=0.9, impl="cpp")
    want = ops.gae(rewards, values, mask, cu_seqlens, gamma=1.0, lam=0.9, impl="cpp")
    assert all(torch.equal(g, w) and not g.requires_grad for g, w in zip(got, want, strict=True))


def test_errors():
    rewards, values, mask, cu_seqlens = case([4])
    with pytest.raises(
        RuntimeError, match=r"gae: values must be CPU Float of shape \[4\], got CPU Float of shape \[3\]"
    ):
        ops.gae(rewards, values[:3], mask, cu_seqlens, gamma=1.0, lam=1.0)
    with pytest.raises(RuntimeError, match=r"gae: action_mask must be CPU Bool of shape \[4\], got CPU Float"):
        ops.gae(rewards, values, mask.float(), cu_seqlens, gamma=1.0, lam=1.0)
    with pytest.raises(RuntimeError, match="cu_seqlens must start with 0 and end with 4"):
        ops.gae(rewards, values, mask, torch.tensor([0, 3], dtype=torch.int32), gamma=1.0, lam=1.0)
    with pytest.raises(RuntimeError, match="cu_seqlens must never decrease, got 5 then 4"):
        ops.gae(rewards, values, mask, torch.tensor([0, 5, 4], dtype=torch.int32), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="gamma is 1.5"):
        ops.gae(rewards, values, mask, cu_seqlens, gamma=1.5, lam=1.0)
    with pytest.raises(ValueError, match="impl is 'opencl', expected auto, reference or cpp or cuda"):
        ops.gae(rewards, values, mask, cu_seqlens, gamma=1.0, lam=1.0, impl="opencl")
    with pytest.raises(ValueError, match="rewards is float64 on cpu, impl cpp takes float32 on cpu"):
        ops.gae(rewards.double(), values.double(), mask, cu_seqlens, gamma=1.0, lam=1.0, impl="cpp")


def test_opcheck_and_compile():
    rewards, values, mask, cu_seqlens = case([4, 9])
    torch.library.opcheck(torch.ops.aligner.gae.default, (rewards, values, mask, cu_seqlens, 0.9, 0.8))

    def call(rewards, values):
        return ops.gae(rewards * 2, values, mask, cu_seqlens, gamma=0.9, lam=0.8)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(rewards, values)
    for got, want in zip(compiled, call(rewards, values), strict=True):
        assert torch.equal(got, want)
