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


def adapted_kl_coef(coef: float, kl: float, *, target: float, horizon: float, sequences: float) -> float:
    r"""The KL coefficient of the next step, which moves towards the one that keeps the KL at a target.

        e = clip(kl / target - 1, -0.2, 0.2),    coef' = coef (1 + e sequences / horizon)

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2, whose constant K is sequences / horizon.

    coef: dimensionless, of this step. kl: nats a response, of this step.
    target: nats a response, > 0.
    horizon: responses, > 0, over which the coefficient may change by about 20 %. sequences: responses of this step.
    Returns the coefficient, dimensionless. Raises ValueError for target and horizon.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"adapted_kl_coef: target is {target} and horizon is {horizon}, expected both more than 0.")
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * sequences / horizon)
