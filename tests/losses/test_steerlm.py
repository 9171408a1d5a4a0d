"""SteerLM 2 by hand."""

import math

import pytest
import torch

from aligner.losses.steerlm import steerlm2_loss
from tests.losses.batches import assert_adds_up, gradients, packed, responses, to


def example():
    g = torch.Generator().manual_seed(0)
    batch = packed(
        target_log_weights_B=torch.tensor([0.5, -1.0, 0.2, 3.0, 2.0, 3.5], dtype=torch.float64),
        proposal_logprobs_B=torch.tensor([-2.0, -1.5, -3.0, -1.0, -2.5, -0.7], dtype=torch.float64),
    )
    return [-torch.rand(len(batch.action_mask_N), generator=g, dtype=torch.float64) * batch.action_mask_N], batch


def softmax(x: list[float]) -> list[float]:
    total = sum(map(math.exp, x))
    return [math.exp(v) / total for v in x]


def weights(logprobs_N, batch, n: int) -> list[tuple[list[float], list[float]]]:
    """(p, q) of each group."""
    sums = [sum(float(logprobs_N[t]) for t in tokens) for tokens in responses(batch)]
    ratio = [s - float(x) for s, x in zip(sums, batch.proposal_logprobs_B, strict=True)]
    target = batch.target_log_weights_B.tolist()
    return [(softmax(target[i : i + n]), softmax(ratio[i : i + n])) for i in range(0, len(ratio), n)]


def steerlm(n: int):
    return lambda logprobs_N, batch: steerlm2_loss(logprobs_N, batch, 6.0 / n, n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 3])
def test_divergence_by_hand(n, dtype):
    (logprobs_N,), batch = example()
    groups = weights(logprobs_N, batch, n)
    expected = sum(p * math.log(p / q) for ps, qs in groups for p, q in zip(ps, qs, strict=True)) / len(groups)
    loss, stats = steerlm(n)(logprobs_N.to(dtype), to(batch, dtype))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert stats.keys() == {"steerlm2_loss", "distance"} and stats["distance"] == loss == stats["steerlm2_loss"]


@pytest.mark.parametrize("n", [2, 3])
def test_gradient_is_q_minus_p_the_weight_of_the_negative_log_likelihood(n):
    tensors, batch = example()
    _, _, (found,) = gradients(steerlm(n), tensors, batch)
    groups = weights(tensors[0], batch, n)
    each = [q - p for ps, qs in groups for p, q in zip(ps, qs, strict=True)]
    for tokens, expected in zip(responses(batch), each, strict=True):
        assert torch.allclose(found[tokens], torch.full((len(tokens),), expected / len(groups), dtype=torch.float64))

    def weighted_likelihood(logprobs_N, batch):  # sum_i (p_i - q_i) NLL_i with constant weights
        nll = [-logprobs_N[tokens].sum() for tokens in responses(batch)]
        return sum(-w * x for w, x in zip(each, nll, strict=True)) / len(groups), {}

    assert torch.allclose(found, gradients(weighted_likelihood, tensors, batch)[2][0])


def test_gradcheck_and_micro_batches_add_up():
    tensors, batch = example()
    assert torch.autograd.gradcheck(lambda x: steerlm(3)(x, batch)[0], tensors[0].clone().requires_grad_())
    for n, parts in ((3, [[0, 1, 2], [3, 4, 5]]), (2, [[2, 3], [0, 1, 4, 5]])):
        assert_adds_up(steerlm(n), [tensors[0].float()], to(batch, torch.float32), parts)


def test_the_policy_that_is_the_posterior_does_not_move():
    tensors, batch = example()
    sums = torch.stack([tensors[0][tokens].sum() for tokens in responses(batch)])
    batch.target_log_weights_B = sums - batch.proposal_logprobs_B + torch.tensor([5.0, 5, 5, -2, -2, -2])
    loss, _, (found,) = gradients(steerlm(3), tensors, batch)
    assert torch.allclose(loss, torch.zeros(()).double(), atol=1e-12) and torch.allclose(found, 0 * found, atol=1e-12)


def test_a_response_without_the_attributes_may_weigh_nothing():
    tensors, batch = example()
    batch.target_log_weights_B[1] = -torch.inf
    loss, _, (found,) = gradients(steerlm(3), tensors, batch)
    _, q = weights(tensors[0], batch, 3)[0]
    assert loss.isfinite() and torch.allclose(found[responses(batch)[1]], torch.tensor(q[1] / 2).double())


def test_groups_must_be_whole():
    tensors, batch = example()
    with pytest.raises(ValueError, match="6 responses do not come in groups of 4"):
        steerlm2_loss(*tensors, batch, 2.0, 4)
    with pytest.raises(ValueError, match="num_prompts is 0"):
        steerlm2_loss(*tensors, batch, 0, 3)
