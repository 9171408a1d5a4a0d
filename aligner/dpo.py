r"""Direct preference optimization and its family: `python -m aligner.dpo --data pairs.jsonl`.

    delta = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected),    x = beta * delta
    dpo: -log s(x)      cdpo, rdpo: with label_smoothing      ipo: (delta - 1 / (2 beta))^2
    rpo_sq, rpo_fwd_kl, rpo_bwd_kl: x against the pair's rewards      simpo, orpo: no reference, mean over tokens
    L = mean over the pairs of the step, plus sft_coef * (-log pi(chosen))

Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; `ops.preference_loss` cites each of the others.
Deviations from NeMo-Aligner (arXiv:2405.01481): chosen and rejected responses of any length are packed together, and a
pair that is too long is told and counted, never replaced by dummy tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aligner.data.batch import PreferenceBatch, pack_pairs
from aligner.data.examples import Pair
from aligner.data.formats import PAIRS
from aligner.job.config import OfflineConfig
from aligner.job.job import Logged
from aligner.job.offline import OfflineRun, train_offline
from aligner.losses.preference import direct_preference_loss
from aligner.losses.statistics import preference_statistics, update_statistics
from aligner.ops.preference_loss import REFERENCE_FREE
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    loss: Literal["dpo", "cdpo", "rdpo", "ipo", "rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl", "simpo", "orpo"] = "dpo"
    """Loss of a pair: see docs/dpo.md."""
    beta: float = 0.1
    """Inverse temperature, 1/nats; for orpo the weight of the odds ratio."""
    average: bool = False
    """Mean log-probability of a response's tokens in place of the sum; simpo and orpo always take it."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be flipped, for cdpo and rdpo."""
    margin: float = 0.5
    """Target margin of simpo."""
    reward_scale: float = 1.0
    """Scale of the pairs' rewards, for the rpo losses."""
    sft_coef: float = 0.0
    """Weight of the negative log-likelihood of the chosen response; orpo's paper takes 1."""
    sft_average: bool = True
    """That of a token in the mean, not of the response."""
    reference_cache: Path | None = None
    """File of the reference's log-probabilities: computed before the first step, or read when it is there already."""


def prepared(run: OfflineRun, pairs: list[Pair]) -> PreferenceBatch:
    """The batch of a step, with what the reference says of it."""
    batch = pack_pairs(pairs)
    rewards_B = torch.tensor([r for pair in pairs for r in (pair.chosen_reward, pair.rejected_reward)])
    reference_B = run.reference.sums(batch) if run.reference else None
    return PreferenceBatch(**vars(batch), reference_logprobs_B=reference_B, rewards_B=rewards_B)


def pair_loss(c: Config, logprobs_N: Tensor, batch: PreferenceBatch, num_pairs: int):
    return direct_preference_loss(
        logprobs_N,
        batch,
        num_pairs,
        kind=c.loss,
        beta=c.beta,
        average=c.average,
        label_smoothing=c.label_smoothing,
        margin=c.margin,
        reward_scale=c.reward_scale,
        sft_coef=c.sft_coef,
        sft_average=c.sft_average,
    )


def step(run: OfflineRun, number: int) -> Logged:
    """One optimizer step on the next pairs."""
    c, pairs = run.config, run.examples(number)
    with run.job.timers("reference"):
        batch = prepared(run, pairs)
    with run.job.timers("train"):
        stats = run.policy.update(
            batch, lambda logprobs_N, _entropy_N, micro: pair_loss(c, logprobs_N, micro, len(pairs))
        )
    metrics = preference_statistics(stats) | update_statistics([stats])
    return metrics | {"tokens": len(batch.tokens_N)}, []


def evaluate(run: OfflineRun, number: int) -> Logged:
    """The same on the held-out pairs, without an update."""
    if not run.held_out:
        return {}, []
    batch = prepared(run, run.held_out)
    loss, stats = pair_loss(run.config, run.policy.infer(batch)[0], batch, len(run.held_out))
    return preference_statistics(stats | {"loss": loss}, prefix="eval/"), []


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    needed = config.loss not in REFERENCE_FREE
    cache = config.reference_cache if needed else None
    return train_offline("dpo", config, PAIRS, step, evaluate, reference=needed, cache=cache, pack=pack_pairs)


if __name__ == "__main__":
    options.user_errors(main)
