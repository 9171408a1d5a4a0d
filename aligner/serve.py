"""Reward model and critic as services: `python -m aligner.serve reward --model runs/rm`, by torchrun for any layout.

Runs of the online programs, on this machine or on others, ask a reward model with `--reward.url host:port`. PPO asks
`python -m aligner.serve critic --model M --output runs/critic --resume` with `--critic.url host:port`; it saves its
weights when the run does and when it ends, and the same line starts it again where it was. docs/serving.md has the
contract. `python -m aligner.serve status host:port` says whether a service is ready, and what it serves.
Its ranks end with status 0 after SIGTERM or Ctrl-C of one, once what waits is answered; with another one whenever else.
"""

import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from aligner.checkpoint import training
from aligner.checkpoint.model_folder import model_folder
from aligner.data.tokenizer import digest
from aligner.job.actor import open_reward_model
from aligner.job.config import ModelToolConfig
from aligner.job.critic import critic_settings, local_critic
from aligner.job.job import Job
from aligner.job.reference import fingerprint
from aligner.models.critic import CriticConfig
from aligner.run import config as options
from aligner.run.directory import CONFIG, RunDirectory
from aligner.run.distributed import agree, is_main
from aligner.serving.access import TRITON, AccessConfig
from aligner.serving.critic_service import CriticService
from aligner.serving.group import Group
from aligner.serving.listen import ServeConfig, listen, watch
from aligner.serving.reward_service import RewardService
from aligner.serving.service import REWARD, SAVE, STATUS, TRAIN, VALUES, Limits, ServiceError, ServiceStatus


@dataclass(frozen=True, kw_only=True)
class Config(ModelToolConfig):
    serve: ServeConfig = field(default_factory=ServeConfig)


@dataclass(frozen=True, kw_only=True)
class CriticServeConfig(Config):
    critic: CriticConfig = field(default_factory=CriticConfig)
    output: Path | None = None
    """Folder for its checkpoints; default runs/critic-<time>."""
    resume: bool = False
    """Go on from the newest checkpoint in --output, if there is one."""
    resume_step: int | None = None
    """Go on from the checkpoint of this step instead; newer ones are renamed."""


@dataclass(frozen=True, kw_only=True)
class BothServeConfig(CriticServeConfig):
    reward_model: str
    """Reward model: folder of a run of aligner.reward_model, or of a Hugging Face sequence classifier."""
    reward_port: int | None = None
    """TCP port of the reward model; default the one after the critic's."""
    swap: bool = False
    """Critic and reward model take turns on the device: the other one waits in host memory."""


def serve_reward(argv: list[str]) -> int:
    config = options.parse(Config, argv)
    job, where = _prepare(config)
    group = _group(config)
    return _serve(config.serve, group, [(reward_service(job, group, job.folder), where)])


def serve_critic(argv: list[str]) -> int:
    config = options.parse(CriticServeConfig, argv)
    job, where = _prepare(config)
    group = _group(config)
    return _serve(config.serve, group, [(critic_service(job, group), where)])


def serve_both(argv: list[str]) -> int:
    """Critic and reward model in the same processes, side by side or by turns: two addresses, and one queue."""
    config = options.parse(BothServeConfig, argv)
    job, where = _prepare(config)
    group, port = _group(config), config.reward_port
    port = port if port is not None else where["port"] and where["port"] + 1
    folder = Path(model_folder(config.reward_model))
    critic, reward = critic_service(job, group), reward_service(job, group, folder)
    if config.swap:
        mine = dict.fromkeys((VALUES, TRAIN, SAVE), critic.critic.critic.network)
        group.take_turns(mine | {REWARD: reward.model.network})
    return _serve(config.serve, group, [(critic, where), (reward, where | {"port": port})])


def reward_service(job: Job, group: Group, folder: Path) -> RewardService:
    return RewardService(group, open_reward_model(job, folder), _digests(job, folder), _limits(job), job.encoder)


def critic_service(job: Job, group: Group) -> CriticService:
    """It goes on from the newest checkpoint, or from that of --resume-step, if there is one."""
    c: CriticServeConfig = job.config
    goes_on = c.resume and c.output and (training.steps(c.output) or c.resume_step is not None)
    checkpoint = training.latest(c.output, c.resume_step) if goes_on else None
    begun = training.read_plain(checkpoint)["plain"] if checkpoint else {}
    started = bool(c.resume and c.output and (c.output / CONFIG).exists())
    needed_bytes = 2 * job.shape.num_bytes()
    path = RunDirectory.create(c.output, "critic", options.to_yaml(c), started, needed_bytes).path
    if checkpoint and is_main():
        training.set_aside(checkpoint)
    critic = local_critic(job, c.critic)
    if checkpoint:
        training.restore(checkpoint, {"critic": critic})
    shared = {"settings": critic_settings(job, c.critic), "folder": path, "begun": begun}
    return CriticService(group, critic, _digests(job, job.folder), _limits(job), job.encoder, **shared)


def _prepare(config: Config) -> tuple[Job, dict]:
    """The joined job, and where to listen: what is wrong with the options is told before anything is loaded."""
    where = config.serve.where()
    job = Job("serve", config)
    job.join()
    return job, where


def _group(config: Config) -> Group:
    return Group(config.serve.request_tokens, config.serve.queue)


def _limits(job: Job) -> Limits:
    tokens = job.config.serve.request_tokens
    return Limits(vocabulary=job.shape.vocab, context=job.shape.context, tokens=tokens)


def _digests(job: Job, folder: Path) -> dict[str, str]:
    return {"model": fingerprint(folder), "tokenizer": digest(job.tokenizer)}


def _serve(c: ServeConfig, group: Group, services: list[tuple[RewardService | CriticService, dict]]) -> int:
    """Listen and work until told to stop. services: each with where it listens."""
    stop, servers = threading.Event(), []
    agree(lambda: servers.extend(listen(c, *each) for each in services) if is_main() else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if servers and c.metrics_port is not None:
        print(f"metrics: http://{c.host}:{group.metrics.publish(c.host, c.metrics_port)}/metrics")
    for server in servers:
        print(f"ready: {TRITON if c.transport == 'pytriton' else ''}{c.host}:{server.port}", flush=True)
        threading.Thread(target=watch, args=(server, stop), daemon=True).start()
    group.run(stop)
    for service, _ in services:
        service.finish()
    if servers:
        stop.set()
        for server in servers:
            server.stop()
        print("stopped: nothing was left to answer", flush=True)
    return 0


def show_status(argv: list[str]) -> int:
    if not argv or argv[0].startswith("--"):
        raise ValueError("got no address; write `python -m aligner.serve status host:port`.")
    connection = options.parse(AccessConfig, argv[1:]).connect(argv[0])
    try:
        status = ServiceStatus.of(connection.call(STATUS, {}, 5.0))
    except ServiceError as error:
        print(f"{argv[0]}: not ready: {error} ({error.code.value})", file=sys.stderr)
        return 1
    print(options.to_yaml(status).strip())
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"reward": serve_reward, "critic": serve_critic, "both": serve_both, "status": show_status}
    if not argv or argv[0] not in commands:
        raise ValueError(
            f"got {argv[0] if argv else 'nothing'!r}, expected `aligner.serve reward`, `critic`, `both` or `status`."
        )
    return commands[argv[0]](argv[1:])


if __name__ == "__main__":
    options.user_errors(main)
