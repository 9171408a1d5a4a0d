r"""Policy gradients with the group as baseline: `python -m aligner.grpo`.

    R_i reward of response i to a prompt;  A_i = (R_i - mean_g) / std_g (grpo),  R_i - mean_g (dr_grpo)
    L = mean_t c_t max(-A rho_t, -A clip(rho_t, 1 - clip_low, 1 + clip_high)) + kl_coef * KL_t - entropy_bonus * H_t
    rho_t = pi(x_t) / pi_old(x_t) (token),  of a whole response, to the power 1 / length (sequence),  or cispo's weight
    c_t corrects for a sampler whose probabilities differ from the trainer's (tis, icepop)

Source: Shao et al. 2024, arXiv:2402.03300, eq. 3 and section 4.1.2; without std: Liu et al. 2025, arXiv:2503.20783,
section 3.2; clip-higher, token mean, dynamic sampling, overlong: Yu et al. 2025, arXiv:2503.14476, section 3; sequence
ratio: Zheng et al. 2025, arXiv:2507.18071, eq. 5-7; cispo: MiniMax 2025, arXiv:2506.13585, eq. 4-5; tis: Yao et al.
2025, fengyao.notion.site/off-policy-rl; icepop: Ling Team 2025, arXiv:2510.18855.

Recipes:  GRPO: the defaults with --average sequence.  Dr. GRPO: --baseline dr_grpo.
DAPO: --clip-high 0.28 --dynamic-sampling 4 --overlong-buffer 16 --kl-coef 0.  GSPO: --ratio sequence --average sequence
--clip-low 3e-4 --clip-high 4e-4.  CISPO: --ratio cispo --clip-low 1 --clip-high 4.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from aligner import ops
from aligner.data.batch import BatchConfig, GroupBatch, Rollout, minibatches
from aligner.job.job import Logged
from aligner.job.online import GroupConfig, OnlineRun, group_batch, train_online
from aligner.losses.policy import group_policy_loss
from aligner.losses.shaping import informative_groups
from aligner.losses.statistics import sampler_statistics, update_statistics
from aligner.rollout.scoring import Scored, join_scored
from aligner.run import config as options


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig):
    baseline: Literal["grpo", "dr_grpo"] = "grpo"
    """What a reward is measured by: its group's mean and standard deviation, or the mean only."""
    ratio: Literal["token", "sequence", "cispo"] = "token"
    """Ratio to the old policy: of a token (GRPO), of a response (GSPO), or clipped as a weight (CISPO)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of the loss at negative advantages, > 1; none leaves it out."""
    kl_coef: float = 0.08
    """Weight of the KL to the reference in the loss; 0 keeps no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Its estimator."""
    dynamic_sampling: int = 1
    """Batches of prompts tried at most, until all groups of a step have responses of different rewards."""
    overlong_buffer: int = 0
    """Tokens before the length limit over which a penalty grows; 0 leaves it out."""
    overlong_penalty: float = 1.0
    """Of a response of the length limit, reward units."""
    batch: BatchConfig = field(
        default_factory=lambda: BatchConfig(sequences=48, samples_per_prompt=8, minibatch_sequences=24)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.batch.samples_per_prompt < 2:
            raise ValueError("batch.samples-per-prompt is 1, and a group of one has no baseline; give 2 or more.")
        if self.dynamic_sampling < 1 or not 0 <= self.overlong_buffer <= self.sampling.max_tokens:
            raise ValueError("dynamic-sampling must be 1 or more, overlong-buffer 0 to sampling.max-tokens.")


def step(run: OnlineRun, number: int) -> Logged:
    """One step: sample groups, score, compare within each group, update, refit."""
    c, timers, b, actor = run.config, run.job.timers, run.config.batch, run.actor
    seed = c.seed * 2**32 + number

    with timers("sample"):
        scored, raw_B, rewards_B, tried = sample_groups(run, number)
        actor.replica.sleep()
        rollout = scored.rollout
    with timers("logprobs"):
        logprobs_N, entropy_N = run.policy.infer(rollout)
    with timers("reference"):
        reference_N = run.policy.infer_reference(rollout) if c.kl_coef else None
    batch = estimate(c, rollout, rewards_B, logprobs_N, reference_N)

    order = list(minibatches(len(rewards_B), b.minibatch_sequences, b.epochs, torch.Generator().manual_seed(seed)))
    with timers("train_policy"):
        minis = [batch.take(sequences) for sequences in order]
        stats = [update(run, mini) for mini in minis if mini.weights_N.any()]
    with timers("refit"):
        actor.replica.refit(number)

    log_ratio_N = logprobs_N - (logprobs_N if reference_N is None else reference_N)
    metrics, rows = actor.record(number, scored, raw_B, log_ratio_N)
    metrics |= sampler_statistics(rollout, logprobs_N, entropy_N) | update_statistics(stats)
    useful = informative_groups(rewards_B, torch.arange(b.sequences) // b.samples_per_prompt)
    return metrics | {"groups/informative": float(useful.float().mean()), "groups/batches_tried": tried}, rows


def sample_groups(run: OnlineRun, number: int) -> tuple[Scored, Tensor, Tensor, int]:
    """(responses, raw rewards, shaped rewards, batches tried): dynamic sampling replaces groups that teach nothing.

    Batch k of step s is number (s - 1) * dynamic_sampling + k of the data's order: a resumed run draws the same.
    """
    c, actor, n = run.config, run.actor, run.config.batch.samples_per_prompt
    limit, wanted = c.sampling.max_tokens, c.batch.sequences // n
    overlong = (limit - c.overlong_buffer, limit, c.overlong_penalty) if c.overlong_buffer else None
    tried: list[Scored] = []
    raw_B, rewards_B = torch.empty(0), torch.empty(0)
    while len(tried) < c.dynamic_sampling:
        index = (number - 1) * c.dynamic_sampling + len(tried)
        scored = actor.sample(actor.prompts(index), c.seed * 2**32 + index + 1)
        new_B = actor.raw_rewards(scored)
        raw_B, rewards_B = (
            torch.cat([raw_B, new_B]),
            torch.cat([rewards_B, actor.shaped(new_B, scored.rollout, overlong)]),
        )
        tried.append(scored)
        useful = informative_groups(rewards_B, torch.arange(len(rewards_B)) // n)[::n]
        if int(useful.sum()) >= wanted:
            break
    best = (~useful).int().argsort(stable=True)[:wanted].sort().values.tolist()
    kept = [group * n + sample for group in best for sample in range(n)]
    return join_scored(tried).take(kept), raw_B[kept], rewards_B[kept], len(tried)


def estimate(
    c: Config, rollout: Rollout, rewards_B: Tensor, logprobs_N: Tensor, reference_N: Tensor | None
) -> GroupBatch:
    """Advantages of the responses within each group, given to all their tokens."""
    groups_B = torch.arange(len(rewards_B)) // c.batch.samples_per_prompt
    advantages_B = ops.group_advantages(rewards_B, groups_B, kind=c.baseline)
    return group_batch(c, rollout, advantages_B, logprobs_N, reference_N)


def update(run: OnlineRun, mini: GroupBatch) -> dict[str, float]:
    """One optimizer step of the policy."""
    c, num = run.config, float(mini.weights_N.sum())
    names = ("ratio", "clip_low", "clip_high", "dual_clip", "entropy_bonus", "kl_coef", "kl_estimator")
    settings = {name: getattr(c, name) for name in names}
    return run.policy.update(
        mini, lambda logprobs_N, entropy_N, micro: group_policy_loss(logprobs_N, entropy_N, micro, num, **settings)
    )


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    return train_online("grpo", config, step, reference=bool(config.kl_coef))


if __name__ == "__main__":
    options.user_errors(main)
