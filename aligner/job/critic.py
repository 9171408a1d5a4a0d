"""The critic of a run: in its own processes, or served by others."""

import json
from dataclasses import fields

from aligner.checkpoint import training
from aligner.data.tokenizer import digest
from aligner.job.job import Job
from aligner.models.critic import Critic, CriticConfig
from aligner.models.parallel import NetworkPlan
from aligner.run import config as options
from aligner.run.distributed import place
from aligner.serving.local import LocalCritic
from aligner.serving.remote import Remote
from aligner.serving.remote_critic import RemoteCritic, ServedCriticConfig


def critic_settings(job: Job, config: CriticConfig) -> str:
    """What a critic's training depends on, which the two sides of a served one must agree about: JSON."""
    names = [field.name.replace("_", "-") for field in fields(CriticConfig)]
    values = {f"critic.{name}": v for name, v in options.flat(config).items() if name.partition(".")[0] in names}
    return json.dumps(values | {"seed": job.config.seed, "dtype": job.config.dtype})


def critic_plans(job: Job, config: ServedCriticConfig) -> list[NetworkPlan]:
    """What a dry run tells of it."""
    if config.url:
        return []
    shape = config.shape(job.shape)
    return [NetworkPlan(name="critic", shape=shape, lora=config.lora, value_head=shape.hidden + 1)]


def local_critic(job: Job, config: CriticConfig) -> LocalCritic:
    """A critic that starts from the run's model, on the run's layout."""
    shared = {"lora": config.lora, "optimizer": config.optimizer} | job.shared()
    return LocalCritic(Critic(config.shape(job.shape), job.read, **shared), config.value_clip)


def open_critic(job: Job, config: ServedCriticConfig) -> LocalCritic | RemoteCritic:
    """Raises ValueError when a served one is not ready, does not fit, or is at another step than the run."""
    if not config.url:
        return local_critic(job, config)
    saved = job.plain().get("critic", {})
    if job.checkpoint and "run_id" not in saved:
        raise ValueError(f"{job.checkpoint} has a critic of its own; leave --critic.url out to go on with it.")
    remote = Remote("critic", config.url, options="critic", access=config) if place().leads else None
    path = job.directory.path
    where = {"run": path, "saved": saved, "saves": training.steps(path), "dtype": config.answer_dtype}
    return RemoteCritic(remote, digest(job.tokenizer), critic_settings(job, config), **where)
