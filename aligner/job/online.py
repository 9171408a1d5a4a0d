"""A whole run of the online programs whose only network is the policy: what differs between them is their step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from aligner.data.batch import GroupBatch, Rollout
from aligner.job.actor import Actor, load_prompts, load_rewards
from aligner.job.config import OnlineConfig
from aligner.job.job import Job, Logged
from aligner.losses.policy import sampler_correction, token_weights
from aligner.models.lora import LoRAConfig
from aligner.models.network import OptimizerConfig
from aligner.models.parallel import NetworkPlan
from aligner.models.policy import Policy


@dataclass(frozen=True, kw_only=True)
class GroupConfig(OnlineConfig):
    """Options of methods whose advantages are of whole responses."""

    entropy_bonus: float = 0.0
    """Weight of the mean entropy in the objective."""
    average: Literal["token", "sequence"] = "token"
    """Mean over all tokens, or over responses of each one's token mean."""
    correction: Literal["none", "tis", "icepop"] = "none"
    """Correction for the sampler: truncated importance weights, or tokens outside of the range left out."""
    correction_low: float = 0.5
    """Smallest weight of icepop."""
    correction_high: float = 2.0
    """Largest weight."""
    mask_unfinished: bool = False
    """Leave responses that reached the length limit out of the loss."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-3))


def group_batch(
    c: GroupConfig, rollout: Rollout, advantages_B: Tensor, logprobs_N: Tensor, reference_N: Tensor | None
) -> GroupBatch:
    """The batch of an update: each response's advantage given to all its tokens.

    reference_N: None where no KL is in the loss.
    """
    mask_N, cu_seqlens = rollout.action_mask_N, rollout.cu_seqlens
    counts_B = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    bounds = {"kind": c.correction, "low": c.correction_low, "high": c.correction_high}
    return GroupBatch(
        rollout=rollout,
        old_logprobs_N=logprobs_N,
        advantages_N=torch.repeat_interleave(advantages_B, counts_B) * mask_N,
        weights_N=token_weights(mask_N, cu_seqlens, c.average, rollout.finished_B if c.mask_unfinished else None),
        importance_N=sampler_correction(logprobs_N, rollout.sampler_logprobs_N, mask_N, **bounds),
        reference_logprobs_N=reference_N,
    )


@dataclass(frozen=True)
class OnlineRun:
    """What a step uses. config: the program's own, with `lora` and `optimizer` of the policy."""

    config: Any
    job: Job
    actor: Actor
    policy: Policy


def train_online(
    program: str, config: OnlineConfig, step: Callable[[OnlineRun, int], Logged], *, reference: bool = True
) -> int:
    """Train the policy by `step(run, number) -> (metrics, rows for samples.jsonl)`. Returns the exit status.

    reference: False when no step asks for the reference; held-out prompts do too.
    """
    job = Job(program, config)
    if job.dry_run(NetworkPlan(name="policy", shape=job.shape, lora=config.lora)):
        return 0
    train, held_out = load_prompts(job)
    job.begin()
    rewards = load_rewards(job, config.reward)
    temperature, reference = config.sampling.temperature, reference or bool(held_out)
    policy = job.policy(config.lora, config.optimizer, temperature=temperature, reference=reference)
    job.restore(policy=policy)
    actor = Actor(job, policy, train, held_out, rewards)
    return job.repeat(
        step=partial(step, OnlineRun(config, job, actor, policy)),
        evaluate=actor.evaluate,
        networks={"policy": policy},
        export=policy.hugging_face,
    )
