r"""Estimators of the KL divergence between the policy and the reference from one sampled token.

    d = log pi(x) - log pi_ref(x):   k1 = d,   abs = |d|,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d

Source: Schulman 2020, "Approximating KL Divergence", joschu.net/blog/kl-approx.html; abs: Shen et al. 2024,
arXiv:2405.01481, whose default is the absolute log-ratio.
"""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "abs", "k2", "k3"]


def kl_estimate(logprobs_N: Tensor, reference_logprobs_N: Tensor, kind: Estimator) -> Tensor:
    """Per-token estimate of KL(policy || reference).

    logprobs_N, reference_logprobs_N: (N,) float32, nats. Returns (N,) float32, nats.
    k1 and k3 are unbiased under the policy's own samples, k2 and abs are not; abs, k2 and k3 are never negative.
    """
    d = logprobs_N - reference_logprobs_N
    match kind:
        case "k1":
            return d
        case "abs":
            return d.abs()
        case "k2":
            return 0.5 * d.square()
        case "k3":
            return torch.exp(-d) - 1 + d
    raise ValueError(f"kl estimator is {kind!r}, expected k1, abs, k2 or k3.")
