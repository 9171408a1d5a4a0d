"""Policy losses against loops over Python floats, and the identities between methods."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from aligner import ops
from aligner.losses.policy import (
    clipped_policy_loss,
    group_policy_loss,
    reinforce_loss,
    sampler_correction,
    token_weights,
)
from tests.losses.batches import LENGTHS, assert_adds_up, gradients, packed, responses, take, to

NAMES = {"policy_loss", "clip_fraction", "approx_kl", "ratio", "ratio_clamped", "entropy", "kl", "importance"}
RATIOS = ("token", "sequence", "cispo")
CLIP = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}
PLAIN = {"entropy_bonus": 0.0, "kl_coef": 0.0, "kl_estimator": "k3"}
EXTRA = {"entropy_bonus": 0.01, "kl_coef": 0.05, "kl_estimator": "k3"}


def example(average: str = "token", seed: int = 0, lengths=LENGTHS, constant: bool = False, **changes):
    """(logprobs_N, entropy_N), batch and the denominator, in float64; one advantage a sequence where `constant`."""
    g = torch.Generator().manual_seed(seed)
    rollout = packed(lengths)
    mask_N = rollout.action_mask_N

    def noise():
        return torch.randn(len(mask_N), generator=g, dtype=torch.float64)

    old_N = (-2 + 0.3 * noise()) * mask_N
    advantages_N = noise() * mask_N
    if constant:
        counts = rollout.cu_seqlens.diff().long()
        advantages_N = torch.randn(len(counts), generator=g).double().repeat_interleave(counts) * mask_N
    batch = SimpleNamespace(
        rollout=rollout,
        old_logprobs_N=old_N,
        advantages_N=advantages_N,
        weights_N=token_weights(mask_N, rollout.cu_seqlens, average),
        importance_N=torch.where(mask_N, noise().exp().clamp(max=2), 1),
        reference_logprobs_N=(old_N + 0.4 * noise()) * mask_N,
    )
    vars(batch).update(changes)
    logprobs_N, entropy_N = (old_N + 0.4 * noise()) * mask_N, noise().abs() * mask_N
    return (logprobs_N, entropy_N), batch, float(batch.weights_N.sum())


def loss_of(ratio: str, num: float, **settings):
    """The loss as a function of (logprobs_N, entropy_N, batch)."""
    if ratio == "reinforce":
        return lambda lp, h, batch: reinforce_loss(lp, h, batch, num, **settings)
    return lambda lp, h, batch: group_policy_loss(lp, h, batch, num, ratio=ratio, **settings)


def surrogate(advantage: float, ratio: float, clip: dict) -> tuple[float, bool]:
    """Clipped loss, and whether a clipped branch is active."""
    clipped = min(max(ratio, 1 - clip["clip_low"]), 1 + clip["clip_high"])
    loss, active = max(-advantage * ratio, -advantage * clipped), -advantage * clipped > -advantage * ratio
    if clip["dual_clip"] and advantage < 0 and -advantage * clip["dual_clip"] < loss:
        return -advantage * clip["dual_clip"], True
    return loss, active


def by_hand(ratio: str, tensors, batch, num: float, clip: dict, extra: dict) -> dict[str, float]:
    """Loss and statistics from loops over Python floats."""
    lp, h = (x.tolist() for x in tensors)
    old, adv, w, c, ref = (
        getattr(batch, f"{name}_N").tolist()
        for name in ("old_logprobs", "advantages", "weights", "importance", "reference_logprobs")
    )
    low, high = (0, math.inf) if ratio == "reinforce" else (1 - clip["clip_low"], 1 + clip["clip_high"])
    sums = dict.fromkeys(NAMES, 0.0)
    for tokens in responses(batch.rollout):
        if ratio == "sequence":
            n, weight = len(tokens), sum(w[t] for t in tokens)
            s = math.exp(sum(lp[t] - old[t] for t in tokens) / n)
            loss, active = surrogate(sum(adv[t] for t in tokens) / n, s, clip)
            sums["policy_loss"] += weight * sum(c[t] for t in tokens) / n * loss
            sums["clip_fraction"] += weight * active
            sums["ratio"] += weight * s
            sums["ratio_clamped"] += weight * min(max(s, low), high)
            sums["importance"] += weight * sum(c[t] for t in tokens) / n
        for t in tokens:
            r, x = math.exp(lp[t] - old[t]), lp[t] - ref[t]
            sums["entropy"] += w[t] * h[t]
            sums["kl"] += w[t] * {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[extra["kl_estimator"]]
            sums["approx_kl"] += w[t] * (r - 1 - math.log(r))
            if ratio != "sequence":
                sums["ratio"] += w[t] * r
                sums["ratio_clamped"] += w[t] * min(max(r, low), high)
                sums["importance"] += w[t] * c[t]
            if ratio == "token":
                loss, active = surrogate(adv[t], r, clip)
                sums["policy_loss"] += w[t] * c[t] * loss
                sums["clip_fraction"] += w[t] * active
            elif ratio == "cispo":
                sums["policy_loss"] -= w[t] * c[t] * adv[t] * min(max(r, low), high)
                sums["clip_fraction"] += w[t] * (not low <= r <= high)
            elif ratio == "reinforce":
                sums["policy_loss"] -= w[t] * c[t] * adv[t]
    means = {name: total / num for name, total in sums.items()}
    entropy, kl = extra["entropy_bonus"] * means["entropy"], extra["kl_coef"] * means["kl"]
    return means | {"loss": means["policy_loss"] - entropy + kl}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(
    ("ratio", "dual_clip"),
    [("token", None), ("token", 1.2), ("sequence", None), ("sequence", 1.2), ("cispo", None), ("reinforce", None)],
)
def test_values_and_statistics_by_hand(ratio, dual_clip, estimator, average, dtype):
    tensors, batch, num = example(average, seed=3)
    clip, extra = CLIP | {"dual_clip": dual_clip}, EXTRA | {"kl_estimator": estimator}
    expected = by_hand(ratio, tensors, batch, num, clip, extra)
    settings = extra if ratio == "reinforce" else clip | extra
    loss, stats = loss_of(ratio, num, **settings)(*(x.to(dtype) for x in tensors), to(batch, dtype))
    exact = 1e-12 if dtype == torch.float64 and average == "token" else 2e-6
    for name, value in (stats | {"loss": loss}).items():
        assert float(value) == pytest.approx(expected[name], rel=exact, abs=exact), name
    assert stats.keys() == NAMES
    if ratio != "reinforce":
        assert 0 < expected["clip_fraction"] < 1  # both sides of the clip are in the example


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradcheck(ratio, estimator):
    tensors, batch, num = example("sequence", lengths=LENGTHS[:4])
    batch = to(batch, torch.float64)
    loss = loss_of(ratio, num, **CLIP | {"dual_clip": 1.5}, **EXTRA | {"kl_estimator": estimator})
    leaves = [x.clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda lp, h: loss(lp, h, batch)[0], leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ratio", ["cispo", "reinforce"])
def test_gradient_of_the_score_function_by_hand(ratio, dtype):
    tensors, batch, num = example("token")
    settings = EXTRA if ratio == "reinforce" else CLIP | EXTRA
    loss = loss_of(ratio, num, **settings)
    _, _, (d_logprobs, d_entropy) = gradients(loss, [x.to(dtype) for x in tensors], to(batch, dtype))
    for t in range(len(d_logprobs)):
        lp, old, ref = (float(x[t]) for x in (tensors[0], batch.old_logprobs_N, batch.reference_logprobs_N))
        factor = min(max(math.exp(lp - old), 0.8), 1.3) if ratio == "cispo" else 1
        score = -float(batch.importance_N[t]) * factor * float(batch.advantages_N[t])
        expected = float(batch.weights_N[t]) * (score + 0.05 * (1 - math.exp(ref - lp))) / num
        assert float(d_logprobs[t]) == pytest.approx(expected, rel=2e-6, abs=1e-8)
        assert float(d_entropy[t]) == pytest.approx(-0.01 * float(batch.weights_N[t]) / num, rel=1e-6)


@pytest.mark.parametrize("ratio", [*RATIOS, "reinforce"])
@pytest.mark.parametrize("average", ["token", "sequence"])
def test_gradient_does_not_depend_on_the_micro_batch_size(ratio, average):
    tensors, batch, num = example(average)
    settings = EXTRA if ratio == "reinforce" else CLIP | EXTRA
    tensors, batch = [x.float() for x in tensors], to(batch, torch.float32)
    for parts in ([[0, 1, 2], [3, 4, 5]], [[5], [4], [0, 3], [2, 1]]):
        assert_adds_up(loss_of(ratio, num, **settings), tensors, batch, parts)


@pytest.mark.parametrize("ratio", [*RATIOS, "reinforce"])
def test_no_nan_from_a_micro_batch_that_is_all_masked(ratio):
    tensors, batch, num = example("token")
    rollout, nan_N = batch.rollout, torch.full_like(tensors[0], torch.nan)
    nothing = torch.zeros(len(rollout.cu_seqlens) - 1, dtype=torch.bool)
    batch.weights_N = token_weights(rollout.action_mask_N, rollout.cu_seqlens, "sequence", nothing)
    for name in ("old_logprobs_N", "advantages_N", "importance_N", "reference_logprobs_N"):
        setattr(batch, name, nan_N)
    settings = EXTRA if ratio == "reinforce" else CLIP | EXTRA
    for dtype in (torch.float32, torch.float64):
        loss, stats, found = gradients(loss_of(ratio, num, **settings), [nan_N.to(dtype)] * 2, to(batch, dtype))
        assert loss == 0 and all(x == 0 for x in stats.values()) and all((g == 0).all() for g in found)


@pytest.mark.parametrize("ratio", [*RATIOS, "reinforce"])
def test_importance_and_reference_may_be_absent(ratio):
    tensors, batch, num = example(importance_N=None, reference_logprobs_N=None)
    ones = example(importance_N=torch.ones_like(tensors[0]))[1]
    settings = PLAIN if ratio == "reinforce" else CLIP | PLAIN
    loss, stats, found = gradients(loss_of(ratio, num, **settings), tensors, batch)
    same, _, expected = gradients(loss_of(ratio, num, **settings), tensors, ones)
    assert torch.equal(loss, same) and torch.equal(found[0], expected[0])
    assert "kl" not in stats and "importance" not in stats
    with pytest.raises(ValueError, match="kl_coef"):
        loss_of(ratio, num, **settings | {"kl_coef": 0.1})(*tensors, batch)


def test_grpo_with_one_clip_is_ppo_without_a_critic():
    tensors, batch, num = example(constant=True, importance_N=None)
    settings = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    grpo = gradients(loss_of("token", num, **settings, **PLAIN), tensors, batch)
    ppo = gradients(lambda lp, h, b: clipped_policy_loss(lp, h, b, num, **settings, entropy_bonus=0.0), tensors, batch)
    assert torch.equal(grpo[0], ppo[0]) and torch.equal(grpo[2][0], ppo[2][0])
    on_policy = [batch.old_logprobs_N, tensors[1]]  # ratio 1: minus the mean advantage, and REINFORCE's gradient
    loss, _, (found, _) = gradients(loss_of("token", num, **settings, **PLAIN), on_policy, batch)
    assert torch.isclose(loss, -(batch.advantages_N * batch.weights_N).sum() / num)
    assert torch.allclose(found, gradients(loss_of("reinforce", num, **PLAIN), on_policy, batch)[2][0])


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_gspo_of_responses_of_one_token_is_the_token_ratio(dual_clip):
    tensors, batch, num = example(lengths=[(2, 1), (1, 1), (3, 1), (1, 1)])
    settings = CLIP | EXTRA | {"dual_clip": dual_clip}
    one = gradients(loss_of("token", num, **settings), tensors, batch)
    other = gradients(loss_of("sequence", num, **settings), tensors, batch)
    assert torch.isclose(one[0], other[0])
    assert all(torch.allclose(a, b) for a, b in zip(one[2], other[2], strict=True))
    assert all(torch.isclose(one[1][name], other[1][name]) for name in one[1])


def test_gspo_moves_all_tokens_of_a_response_alike():
    tensors, batch, num = example("sequence", constant=True, importance_N=None)
    settings = {"clip_low": 10.0, "clip_high": 10.0, "dual_clip": None}
    _, _, (found, _) = gradients(loss_of("sequence", num, **settings, **PLAIN), tensors, batch)
    for tokens in responses(batch.rollout):
        s = math.exp(sum(float(tensors[0][t] - batch.old_logprobs_N[t]) for t in tokens) / len(tokens))
        expected = -s * float(batch.advantages_N[tokens[0]]) / len(tokens) / num
        assert torch.allclose(found[tokens], torch.full((len(tokens),), expected, dtype=torch.float64))


def test_cispo_inside_the_range_is_reinforce_times_the_ratio():
    tensors, batch, num = example()
    wide = {"clip_low": 0.9, "clip_high": 10.0, "dual_clip": None}
    _, stats, (cispo, _) = gradients(loss_of("cispo", num, **wide, **PLAIN), tensors, batch)
    _, _, (reinforce, _) = gradients(loss_of("reinforce", num, **PLAIN), tensors, batch)
    assert stats["clip_fraction"] == 0
    assert torch.allclose(cispo, reinforce * (tensors[0] - batch.old_logprobs_N).exp())


def test_cispo_learns_from_tokens_that_ppo_clips():
    tensors, batch, num = example(importance_N=None)
    token = gradients(loss_of("token", num, **CLIP, **PLAIN), tensors, batch)[2][0]
    cispo = gradients(loss_of("cispo", num, **CLIP, **PLAIN), tensors, batch)[2][0]
    clipped_N = (token == 0) & batch.rollout.action_mask_N
    assert clipped_N.any() and (cispo[clipped_N] != 0).all()


def test_rloo_advantages_have_mean_zero_in_each_group():
    rewards_B = torch.randn(12, generator=torch.Generator().manual_seed(0))
    groups_B = torch.arange(3).repeat_interleave(4)
    advantages_B = ops.group_advantages(rewards_B, groups_B, kind="rloo")
    assert torch.allclose(advantages_B.view(3, 4).sum(1), torch.zeros(3), atol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_what_the_kl_term_minimises(ratio, estimator):
    """Over all tokens, each as often as the policy draws it: the expectation of the gradient, exactly."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    batch = SimpleNamespace(
        rollout=packed([(0, 1)] * 7),
        old_logprobs_N=policy.detach(),
        advantages_N=torch.zeros(7, dtype=torch.float64),
        weights_N=policy.detach().exp(),
        importance_N=None,
        reference_logprobs_N=reference,
    )
    settings = CLIP | {"entropy_bonus": 0.0, "kl_coef": 1.0, "kl_estimator": estimator}
    loss, _ = loss_of(ratio, 1.0, **settings)(policy, torch.zeros(7, dtype=torch.float64), batch)
    forward = (reference.exp() * (reference - policy)).sum()
    backward = (policy.exp() * (policy - reference)).sum()
    expected = {"k1": 0 * forward, "k2": backward, "k3": forward}[estimator]
    found, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
    assert torch.allclose(found, wanted, atol=1e-12)


def test_arguments_that_a_ratio_does_not_have():
    tensors, batch, num = example()
    with pytest.raises(ValueError, match="token, sequence or cispo"):
        loss_of("word", num, **CLIP, **PLAIN)(*tensors, batch)
    with pytest.raises(ValueError, match="cispo has no dual clip"):
        loss_of("cispo", num, **CLIP | {"dual_clip": 3.0}, **PLAIN)(*tensors, batch)
    with pytest.raises(ValueError, match="clip_low is -0.1"):
        loss_of("cispo", num, **CLIP | {"clip_low": -0.1}, **PLAIN)(*tensors, batch)


def test_weights_of_a_step_add_up_to_its_denominator():
    mask_N = torch.tensor([0, 1, 1, 1, 0, 0, 1], dtype=torch.bool)
    weights = partial(token_weights, mask_N, torch.tensor([0, 4, 7], dtype=torch.int32))
    third = 1 / 3
    assert weights("token").tolist() == [0, 1, 1, 1, 0, 0, 1]
    assert torch.allclose(weights("sequence"), torch.tensor([0, third, third, third, 0, 0, 1]))
    with pytest.raises(ValueError, match="token or sequence"):
        weights("words")


def test_responses_that_reached_the_length_limit_weigh_nothing():
    mask_N = torch.tensor([0, 1, 1, 1, 0, 0, 1], dtype=torch.bool)
    weights = partial(token_weights, mask_N, torch.tensor([0, 4, 7], dtype=torch.int32))
    first, second, none = torch.tensor([[True, False], [False, True], [False, False]])
    assert weights("token", first).tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert torch.allclose(weights("sequence", first), torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0]))
    assert weights("sequence", second).tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert weights("sequence", second).sum() == 1 and weights("token", first).sum() == 3  # the denominators
    assert weights("sequence", none).tolist() == weights("token", none).tolist() == [0] * 7


def test_leaving_a_sequence_out_is_not_having_sampled_it():
    """NeMo-Aligner's REINFORCE trains on responses that did not end, its PPO leaves them out."""
    tensors, batch, _ = example(lengths=LENGTHS)
    rollout = batch.rollout
    keep_B = torch.tensor([True, True, True, True, False, False])
    batch.weights_N = token_weights(rollout.action_mask_N, rollout.cu_seqlens, "sequence", keep_B)
    num = float(batch.weights_N.sum())
    assert num == pytest.approx(4)
    kept = rollout.cu_seqlens[4]
    short = take(batch, range(4))
    for ratio in ("token", "sequence"):
        loss, _, (found, _) = gradients(loss_of(ratio, num, **CLIP, **EXTRA), tensors, batch)
        same, _, (expected, _) = gradients(loss_of(ratio, num, **CLIP, **EXTRA), [x[:kept] for x in tensors], short)
        assert torch.isclose(loss, same) and torch.allclose(found[:kept], expected) and not found[kept:].any()


def test_sampler_correction_by_hand():
    sampler_N = torch.tensor([-1.0, -1.0, -1.0, -1.0, 5.0, torch.nan])
    ratio = [0.25, 0.5, 3.0, 5.0]
    old_N = torch.tensor([math.log(r) - 1 for r in ratio] + [0.0, 1.0], requires_grad=True)
    mask_N = torch.tensor([True] * 4 + [False] * 2)
    correct = partial(sampler_correction, old_N, sampler_N, mask_N, low=0.5 - 1e-6, high=3.0 + 1e-6)
    assert correct(kind="none").tolist() == [1] * 6
    assert torch.allclose(correct(kind="tis"), torch.tensor([0.25, 0.5, 3, 3, 1, 1]))
    assert torch.allclose(correct(kind="icepop"), torch.tensor([0.0, 0.5, 3, 0, 1, 1]))
    assert not correct(kind="tis").requires_grad
    assert torch.allclose(correct(kind="tis", low=0.0, high=0.4), torch.tensor([0.25, 0.4, 0.4, 0.4, 1, 1]))
    far = {"low": 0.5, "high": 2.0}  # exp overflows
    assert sampler_correction(torch.tensor([0.0]), torch.tensor([-200.0]), mask_N[:1], kind="tis", **far) == 2
    assert sampler_correction(torch.tensor([0.0]), torch.tensor([-200.0]), mask_N[:1], kind="icepop", **far) == 0
    with pytest.raises(ValueError, match="none, tis or icepop"):
        correct(kind="clip")
    with pytest.raises(ValueError, match="low < high"):
        correct(kind="tis", low=3.0, high=2.0)
