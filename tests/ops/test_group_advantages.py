import pytest
import torch
from three_way import assert_three_way

from aligner import ops

SIZES = [[], [1], [4, 4], [1, 2, 3, 1], [16] * 33, [4097, 3, 5000]]
COMPILED = ("grpo", "dr_grpo", "rloo")


def case(sizes):
    generator = torch.Generator().manual_seed(sum(sizes))
    groups = torch.repeat_interleave(torch.arange(len(sizes)).flip(0) * 7 - 5, torch.tensor(sizes, dtype=torch.int64))
    return 3 + torch.randn(sum(sizes), generator=generator), groups


def textbook(rewards, groups, kind):
    """Group by group, with torch's own mean and standard deviation."""
    out = torch.zeros_like(rewards)
    for g in groups.unique():
        at = (groups == g).nonzero().squeeze(1)
        r = rewards[at]
        if kind == "rloo":
            others = [torch.cat([r[:i], r[i + 1 :]]) for i in range(len(r))]
            out[at] = torch.stack([r[i] - o.mean() if len(o) else r[i] * 0 for i, o in enumerate(others)])
        else:
            scale = 1 / (r.std() + 1e-6) if kind == "grpo" and len(r) > 1 else float(kind != "grpo")
            out[at] = (r - r.mean()) * scale
    if kind == "reinforce_pp" and len(out):
        out = (out - out.mean()) / (out.var(correction=0) + 1e-8).sqrt()
    return out


@pytest.mark.parametrize("sizes", SIZES[:-1])
@pytest.mark.parametrize("kind", [*COMPILED, "reinforce_pp"])
def test_three_way(isa, sizes, kind):
    rewards, groups = case(sizes)
    eager, kernel = (ops.group_advantages(rewards, groups, kind=kind, impl=impl) for impl in ("reference", "cpp"))
    assert_three_way(textbook(rewards.double(), groups, kind), eager, kernel, epsilon=2e-6, what=kind)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_large_groups_across_threads(isa, kind):
    rewards, groups = case(SIZES[-1])
    eager, kernel = (ops.group_advantages(rewards, groups, kind=kind, impl=impl) for impl in ("reference", "cpp"))
    assert_three_way(textbook(rewards.double(), groups, kind), eager, kernel, epsilon=2e-6, what=kind)


def test_by_hand(isa):
    rewards, groups = torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 9])
    call = lambda kind: ops.group_advantages(rewards, groups, kind=kind, impl="cpp")  # noqa: E731
    torch.testing.assert_close(call("dr_grpo"), torch.tensor([-1.0, 1.0, 0.0]))
    torch.testing.assert_close(call("rloo"), torch.tensor([-2.0, 2.0, 0.0]))
    torch.testing.assert_close(call("grpo"), torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0]))


def test_equal_rewards_give_nothing(isa):
    groups = torch.zeros(8, dtype=torch.int64)
    for kind in (*COMPILED, "reinforce_pp"):
        assert (ops.group_advantages(torch.full((8,), 0.1), groups, kind=kind, impl="cpp").abs() < 1e-6).all(), kind


def test_errors():
    rewards, groups = case([2, 2])
    with pytest.raises(RuntimeError, match="equal groups must be adjacent, got 2 again at index 2; sort by group"):
        ops.group_advantages(rewards, torch.tensor([2, 5, 2, 5]), kind="rloo")
    with pytest.raises(RuntimeError, match=r"groups must be CPU Long of shape \[4\], got CPU Int of shape \[4\]"):
        ops.group_advantages(rewards, groups.int(), kind="rloo")
    with pytest.raises(ValueError, match="kind is 'ppo', expected grpo, dr_grpo, rloo, reinforce_pp"):
        ops.group_advantages(rewards, groups, kind="ppo")


def test_opcheck_and_compile():
    rewards, groups = case([2, 3])
    torch.library.opcheck(torch.ops.aligner.group_advantages.default, (rewards, groups, "grpo"))
    call = lambda r: ops.group_advantages(r * 2, groups, kind="reinforce_pp")  # noqa: E731
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(rewards), call(rewards))
