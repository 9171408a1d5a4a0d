r"""REINFORCE without a critic: `python -m aligner.reinforce`.

    R_i = r_i - kl_coef * sum_t (log pi - log pi_ref)          with --kl-in reward;   R_i = r_i  with --kl-in loss
    A_i = R_i - mean of the other responses to the prompt (rloo),   whiten(R_i - mean_g) over the step (reinforce_pp)
    L   = mean_t -A_i log pi(x_t) + kl_coef * KL_t [--kl-in loss] - entropy_bonus * H_t

Source: Williams 1992, doi:10.1007/BF00992696; rloo: Ahmadian et al. 2024, arXiv:2402.14740, eq. 7; reinforce_pp: Hu et
al. 2025, arXiv:2501.03262 (with one response a prompt the group is the whole step).
Deviations from NeMo-Aligner (arXiv:2405.01481): the KL in the reward is the sum over a response, whose expectation is
the KL divergence, not the mean over its tokens; all responses are in the baseline, those of the length limit too; every
data-parallel rank trains on its own share of the step.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from aligner import ops
from aligner.data.batch import BatchConfig, GroupBatch, Rollout, minibatches
from aligner.job.job import Logged
from aligner.job.online import GroupConfig, OnlineRun, group_batch, train_online
from aligner.losses.policy import reinforce_loss
from aligner.losses.statistics import sampler_statistics, update_statistics
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig):
    baseline: Literal["rloo", "reinforce_pp"] = "rloo"
    """Leave-one-out mean of the prompt's responses, or the group's mean, whitened over the step."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference is: taken from the reward, or a term of the loss."""
    kl_coef: float = 0.08
    """Its weight."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    """Its estimator in the loss; the gradient of k2 is that of KL(policy || reference)."""
    batch: BatchConfig = field(
        default_factory=lambda: BatchConfig(sequences=48, samples_per_prompt=4, minibatch_sequences=48)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.baseline == "rloo" and self.batch.samples_per_prompt < 2:
            raise ValueError(
                "batch.samples-per-prompt is 1, which leaves nothing for a leave-one-out mean; give 2 or more, or "
                "--baseline reinforce_pp."
            )


def step(run: OnlineRun, number: int) -> Logged:
    """One step: sample, score, subtract the baseline, update, refit."""
    c, timers, b, actor = run.config, run.job.timers, run.config.batch, run.actor
    seed = c.seed * 2**32 + number

    with timers("sample"):
        scored = actor.sample(actor.prompts(number - 1), seed)
        actor.replica.sleep()
        rollout = scored.rollout
    with timers("logprobs"):
        logprobs_N, entropy_N = run.policy.infer(rollout)
    with timers("reference"):
        reference_N = run.policy.infer_reference(rollout)
    with timers("reward_wait"):
        raw_B = actor.raw_rewards(scored)
        rewards_B = actor.shaped(raw_B, rollout)
    batch = estimate(c, rollout, rewards_B, logprobs_N, reference_N)

    order = list(minibatches(b.sequences, b.minibatch_sequences, b.epochs, torch.Generator().manual_seed(seed)))
    with timers("train_policy"):
        minis = [batch.take(sequences) for sequences in order]
        stats = [update(run, mini) for mini in minis if mini.weights_N.any()]
    with timers("refit"):
        actor.replica.refit(number)

    metrics, rows = actor.record(number, scored, raw_B, logprobs_N - reference_N)
    return metrics | sampler_statistics(rollout, logprobs_N, entropy_N) | update_statistics(stats), rows


def estimate(c: Config, rollout: Rollout, rewards_B: Tensor, logprobs_N: Tensor, reference_N: Tensor) -> GroupBatch:
    """Advantages of the responses over their baseline, given to all their tokens."""
    n = c.batch.samples_per_prompt
    if c.kl_in == "reward":
        rewards_B = rewards_B - c.kl_coef * ops.segment_sum(logprobs_N - reference_N, rollout.cu_seqlens)
    groups_B = torch.arange(len(rewards_B)) // (n if n > 1 else len(rewards_B))
    advantages_B = ops.group_advantages(rewards_B, groups_B, kind=c.baseline)
    return group_batch(c, rollout, advantages_B, logprobs_N, reference_N if c.kl_in == "loss" else None)


def update(run: OnlineRun, mini: GroupBatch) -> dict[str, float]:
    """One optimizer step of the policy."""
    c, num = run.config, float(mini.weights_N.sum())
    settings = {
        "entropy_bonus": c.entropy_bonus,
        "kl_coef": c.kl_coef if c.kl_in == "loss" else 0.0,
        "kl_estimator": c.kl_estimator,
    }
    return run.policy.update(
        mini, lambda logprobs_N, entropy_N, micro: reinforce_loss(logprobs_N, entropy_N, micro, num, **settings)
    )


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    return train_online("reinforce", config, step)


if __name__ == "__main__":
    options.user_errors(main)
