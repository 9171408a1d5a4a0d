"""A whole run of the online programs whose only network is the policy: what differs between them is their step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from aligner.job.actor import Actor, load_prompts, load_rewards
from aligner.job.config import OnlineConfig
from aligner.job.job import Job, Logged
from aligner.models.parallel import NetworkPlan
from aligner.models.policy import Policy


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
