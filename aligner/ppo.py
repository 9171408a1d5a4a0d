r"""Proximal policy optimization with a critic: `python -m aligner.ppo`.

    r_t = R [t is the last action] - kl_coef * kl_t          kl_t estimates KL(policy || reference) at token t
    A   = whiten(GAE(r, V)),   ret = GAE(r, V) + V
    L_policy = mean_t max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high)) - entropy_bonus * H
    L_value  = mean_t 1/2 max((V_clip - ret)^2, (V - ret)^2)

Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; KL in the reward: Ouyang et al. 2022, arXiv:2203.02155, eq. 2;
its adaptive coefficient: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
Deviations from NeMo-Aligner (arXiv:2405.01481), which this follows otherwise:
  1) Means run over all tokens (or sequences) of the optimizer step, never of a micro-batch.
  2) The KL estimator defaults to k1 (unbiased), not to the absolute log-ratio, which stays selectable.
  3) Several epochs and mini-batches per step; the clip range is asymmetric when asked; dual clip.
  4) Responses that reach the length limit train the policy too, unless --policy.mask-unfinished.
  5) The sampling temperature also divides the logits of the log-probabilities.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from aligner import ops
from aligner.data.batch import PolicyBatch, Rollout, ValueBatch, minibatches
from aligner.job.actor import Actor, load_prompts, load_rewards
from aligner.job.config import OnlineConfig
from aligner.job.critic import critic_plans, open_critic
from aligner.job.job import Job, Logged
from aligner.losses.kl import adapted_kl_coef, kl_estimate
from aligner.losses.policy import clipped_policy_loss, token_weights
from aligner.losses.statistics import estimate_statistics, sampler_statistics, update_statistics
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.parallel import NetworkPlan
from aligner.models.policy import Policy
from aligner.run import config as options
from aligner.serving.local import LocalCritic
from aligner.serving.remote_critic import RemoteCritic, ServedCriticConfig


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-3))
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of the loss at negative advantages, > 1; none leaves it out."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy in the objective."""
    average: Literal["token", "sequence"] = "token"
    """Mean over all tokens, or over sequences of each one's token mean."""
    mask_unfinished: bool = False
    """Leave responses that reached the length limit out of the policy's loss."""


@dataclass(frozen=True, kw_only=True)
class Config(OnlineConfig):
    kl_coef: float = 0.08
    """Weight of the per-token KL penalty in the reward; with kl-target the first one."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Estimator of that penalty."""
    kl_target: float = 0.0
    """KL per response that kl-coef adapts to, nats; 0 keeps it constant."""
    kl_horizon: float = 1000.0
    """Responses over which it may change by 20 %."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    critic_warmup_steps: int = 0
    """First steps, of --steps, that train the critic only."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic: ServedCriticConfig = field(default_factory=ServedCriticConfig)


@dataclass
class Run:
    """Everything that a step uses; kl_coef changes with --kl-target and is saved."""

    config: Config
    job: Job
    actor: Actor
    policy: Policy
    critic: LocalCritic | RemoteCritic
    kl_coef: float


def step(run: Run, number: int) -> Logged:
    """One PPO step: sample, score, estimate, update, refit. Returns metrics and the rows for samples.jsonl."""
    c, timers, b, actor = run.config, run.job.timers, run.config.batch, run.actor
    seed = c.seed * 2**32 + number

    with timers("sample"):
        scored = actor.sample(actor.prompts(number - 1), seed, run.critic)
        actor.replica.sleep()
        rollout = scored.rollout
    with timers("values"):
        values = run.critic.infer(rollout, scored.values())
    with timers("logprobs"):
        logprobs_N, entropy_N = run.policy.infer(rollout)
    with timers("reference"):
        reference_N = run.policy.infer_reference(rollout)
    with timers("reward_wait"):
        raw_B = actor.raw_rewards(scored)
    with timers("estimate"):
        rewards_B = actor.shaped(raw_B, rollout)
        known = rewards_B, logprobs_N, reference_N, values.result()
        policy_batch, value_batch = estimate(c, rollout, *known, run.kl_coef)

    order = list(minibatches(b.sequences, b.minibatch_sequences, b.epochs, torch.Generator().manual_seed(seed)))
    with timers("train_critic"):
        critic_stats = run.critic.train(value_batch, order)
    policy_stats = []
    if number > c.critic_warmup_steps:
        with timers("train_policy"):
            minis = [policy_batch.take(sequences) for sequences in order]
            policy_stats = [update(run, mini) for mini in minis if mini.weights_N.any()]
    with timers("refit"):
        actor.replica.refit(number)

    metrics, rows = actor.record(number, scored, raw_B, logprobs_N - reference_N)
    metrics |= sampler_statistics(rollout, logprobs_N, entropy_N) | estimate_statistics(policy_batch, value_batch)
    metrics |= update_statistics(policy_stats, critic_stats.result()) | {"kl_coef": run.kl_coef}
    if c.kl_target:
        adapting = {"target": c.kl_target, "horizon": c.kl_horizon, "sequences": b.sequences}
        run.kl_coef = adapted_kl_coef(run.kl_coef, metrics["kl/mean"], **adapting)
    return metrics, rows


def estimate(
    c: Config, rollout: Rollout, rewards_B: Tensor, logprobs_N: Tensor, reference_N: Tensor, values_N: Tensor, kl_coef
) -> tuple[PolicyBatch, ValueBatch]:
    """KL penalty, advantages and returns of a rollout."""
    mask_N, cu_seqlens = rollout.action_mask_N, rollout.cu_seqlens
    rewards_N = -kl_coef * kl_estimate(logprobs_N, reference_N, c.kl_estimator) * mask_N
    rewards_N[cu_seqlens[1:].long() - 1] += rewards_B
    advantages_N, returns_N = ops.gae(rewards_N, values_N, mask_N, cu_seqlens, gamma=c.gamma, lam=c.lam)
    weights_N = token_weights(mask_N, cu_seqlens, c.policy.average)
    keep_B = rollout.finished_B if c.policy.mask_unfinished else None
    policy_batch = PolicyBatch(
        rollout=rollout,
        old_logprobs_N=logprobs_N,
        advantages_N=ops.whiten(advantages_N, mask_N),
        weights_N=token_weights(mask_N, cu_seqlens, c.policy.average, keep_B),
    )
    return policy_batch, ValueBatch(rollout=rollout, old_values_N=values_N, returns_N=returns_N, weights_N=weights_N)


def update(run: Run, mini: PolicyBatch) -> dict[str, float]:
    """One optimizer step of the policy."""
    c = run.config.policy
    num_tokens = float(mini.weights_N.sum())
    settings = {"clip_low": c.clip_low, "clip_high": c.clip_high, "dual_clip": c.dual_clip}

    def loss(logprobs_N: Tensor, entropy_N: Tensor, micro: PolicyBatch):
        return clipped_policy_loss(logprobs_N, entropy_N, micro, num_tokens, entropy_bonus=c.entropy_bonus, **settings)

    return run.policy.update(mini, loss)


def main(argv: list[str] | None = None) -> int:
    config = options.parse(Config, argv)
    job, p, c = Job("ppo", config), config.policy, config.critic
    plans = (NetworkPlan(name="policy", shape=job.shape, lora=p.lora), *critic_plans(job, c))
    if job.dry_run(*plans):
        return 0
    train, held_out = load_prompts(job)
    job.begin()
    rewards = load_rewards(job, config.reward)
    policy = job.policy(p.lora, p.optimizer, temperature=config.sampling.temperature)
    critic = open_critic(job, c)
    job.restore(policy=policy, critic=critic)
    actor = Actor(job, policy, train, held_out, rewards, *critic.networks)
    kl_coef = job.plain().get("plain", {}).get("kl_coef", config.kl_coef)
    run = Run(config=config, job=job, actor=actor, policy=policy, critic=critic, kl_coef=kl_coef)
    return job.repeat(
        step=partial(step, run),
        evaluate=actor.evaluate,
        networks={"policy": policy, "critic": critic},
        export=policy.hugging_face,
        plain=lambda: {"kl_coef": run.kl_coef},
    )


if __name__ == "__main__":
    options.user_errors(main)
