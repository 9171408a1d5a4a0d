"""Losses of a reward model that predicts ratings: (scores, batch, num_values) -> (loss, statistics)."""

import torch
from torch import Tensor

from aligner import ops

UNRATED = -100


def num_rated(attributes_BK: Tensor) -> float:
    """Ratings that there are: entries other than -100. Summed over an optimizer step, `regression_loss`'s num_values.

    attributes_BK: (B, K) float32, rating units.
    """
    return float((attributes_BK != UNRATED).sum())


def regression_loss(scores_NK: Tensor, batch, num_values: float) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Mean squared error of the predicted ratings.

        loss = sum_{b, k rated} (s_bk - a_bk)^2 / num_values,    s_bk = sum_{t in b} score_tk

    Source: Wang et al. 2024, arXiv:2406.08673 (reward model of HelpSteer2).

    scores_NK: (N, K) float32, rating units, 0 but at each sequence's last token. Gradients flow to it.
    batch: anything with cu_seqlens and attributes_BK, (B, K) float32, rating units, -100 where there is no rating.
    num_values: ratings of the whole optimizer step (`num_rated`), > 0, so that micro-batches add up.

    Returns the loss, () float32, and detached () float32 statistics, each a sum over the ratings / num_values:
    "regression_loss" and "absolute_error" (rating units). Raises ValueError for shapes and num_values.
    """
    targets_BK = batch.attributes_BK
    if scores_NK.shape[1:] != targets_BK.shape[1:]:
        raise ValueError(
            f"regression_loss: the model gives {scores_NK.shape[1]} scores, the batch has {targets_BK.shape[1]} "
            "attributes; give the model as many outputs as the data has attributes."
        )
    if not num_values > 0:
        raise ValueError(f"regression_loss: num_values is {num_values}, expected the step's positive number of them.")
    predicted_BK = torch.stack([ops.segment_sum(x_N, batch.cu_seqlens) for x_N in scores_NK.unbind(1)], 1)
    error_BK = torch.where(targets_BK != UNRATED, predicted_BK - targets_BK, 0)
    loss = error_BK.square().sum() / num_values
    absolute = error_BK.detach().abs().sum() / num_values
    return loss, {"regression_loss": loss.detach(), "absolute_error": absolute}
