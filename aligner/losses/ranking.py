"""How well scores order responses: metrics of a reward model, without a gradient."""

import scipy.stats
import torch
from torch import Tensor


def calibration(chosen_B: Tensor, rejected_B: Tensor, bins: int = 10) -> float:
    r"""Expected calibration error of a reward model's preferences.

        conf_i = s(|chosen_i - rejected_i|),    right_i = [chosen_i > rejected_i], 1/2 for equals
        ECE = sum_m |B_m| / n |mean_{B_m} right - mean_{B_m} conf|,    bins B_m of equal width on [1/2, 1]

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3. The confidence is that of the response that the model prefers: in
    every pair the chosen one is written first, hence of s(chosen - rejected) alone all outcomes would be 1.

    chosen_B, rejected_B: (B,) float32, reward units, B >= 1.
    Returns the error, dimensionless, in [0, 1].
    """
    d_B = (chosen_B - rejected_B).detach().double().cpu()
    confidence_B, right_B = d_B.abs().sigmoid(), (d_B.sign() + 1) / 2
    bin_B = ((confidence_B - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_B, right_B - confidence_B)
    return float(gap.abs().sum() / len(d_B))


def spearman(x_B: Tensor, y_B: Tensor) -> float:
    """Spearman's rank correlation, equals having the mean of their ranks; NaN where one side does not vary.

    Source: Spearman 1904, doi:10.2307/1412159.

    x_B, y_B: (B,) any dtype, any unit. Returns a dimensionless number in [-1, 1].
    """
    if x_B.min() == x_B.max() or y_B.min() == y_B.max():
        return float("nan")
    return float(scipy.stats.spearmanr(x_B.detach().cpu().numpy(), y_B.detach().cpu().numpy()).statistic)
