"""Regression of ratings by hand."""

import pytest
import torch

from aligner.losses.regression import num_rated, regression_loss
from tests.losses.batches import assert_adds_up, gradients, packed, to

RATINGS = [[3.0, -100.0], [1.0, 4.0], [-100.0, -100.0], [0.0, 2.0], [-100.0, 1.0], [2.0, 2.0]]


def example():
    batch = packed(attributes_BK=torch.tensor(RATINGS, dtype=torch.float64))
    scores_NK = torch.zeros(len(batch.action_mask_N), 2, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    scores_NK[batch.cu_seqlens[1:].long() - 1] = torch.randn(6, 2, generator=g, dtype=torch.float64)
    return [scores_NK], batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_by_hand(dtype):
    (scores_NK,), batch = example()
    errors = []
    for last, ratings in zip((batch.cu_seqlens[1:] - 1).tolist(), RATINGS, strict=True):
        errors += [float(s) - a for s, a in zip(scores_NK[last], ratings, strict=True) if a != -100]
    n = num_rated(batch.attributes_BK)
    assert n == len(errors) == 8 and isinstance(n, float)
    loss, stats = regression_loss(scores_NK.to(dtype), to(batch, dtype), n)
    assert float(loss) == pytest.approx(sum(e * e for e in errors) / 8, rel=1e-6)
    assert float(stats["regression_loss"]) == float(loss)
    assert float(stats["absolute_error"]) == pytest.approx(sum(map(abs, errors)) / 8, rel=1e-6)


def test_gradcheck_and_micro_batches_add_up():
    tensors, batch = example()

    def loss(scores_NK, batch):
        return regression_loss(scores_NK, batch, 8.0)

    assert torch.autograd.gradcheck(lambda x: loss(x, batch)[0], tensors[0].clone().requires_grad_())
    assert_adds_up(loss, [tensors[0].float()], to(batch, torch.float32), [[0, 3], [1, 2, 4, 5]])


def test_no_nan_from_a_micro_batch_that_is_all_masked():
    """NeMo-Aligner divides by a micro-batch's own number of ratings, 0 here."""
    tensors, batch = example()
    batch.attributes_BK = torch.full_like(batch.attributes_BK, -100)
    loss, stats, (found,) = gradients(lambda x, b: regression_loss(x, b, 8.0), tensors, batch)
    assert loss == 0 and not found.any() and stats["absolute_error"] == 0


def test_what_is_not_rated_does_not_pull():
    tensors, batch = example()
    _, _, (found,) = gradients(lambda x, b: regression_loss(x, b, 8.0), tensors, batch)
    unrated = batch.attributes_BK == -100
    assert not found[batch.cu_seqlens[1:].long() - 1][unrated].any()


def test_mistakes_are_told():
    (scores_NK,), batch = example()
    with pytest.raises(ValueError, match="gives 1 scores, the batch has 2 attributes"):
        regression_loss(scores_NK[:, :1], batch, 8.0)
    with pytest.raises(ValueError, match="num_values is 0"):
        regression_loss(scores_NK, batch, 0)
