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
from aligner.serving import grpc_transport
from aligner.serving.critic_service import CriticService
from aligner.serving.remote import read_bytes, read_secret
from aligner.serving.reward_service import RewardService
from aligner.serving.service import STATUS, Limits, ServiceError, ServiceStatus

LOOPBACK = ("127.0.0.1", "localhost", "::1")
GRACE_S = 5.0  # for answers that are on their way when the service ends


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    port: int = 8600
    """TCP port; 0 takes a free one, which is printed."""
    host: str = "127.0.0.1"
    """Address to listen on; another one than loopback needs --serve.token-file, or --serve.insecure."""
    token_file: str = ""
    """File with the secret that every caller must show."""
    insecure: bool = False
    """Let anybody call who reaches the address."""
    tls_cert: str = ""
    """PEM file of the certificate chain; with it connections are encrypted."""
    tls_key: str = ""
    """PEM file of its private key."""
    metrics_port: int | None = None
    """TCP port of /metrics, for Prometheus; none publishes nothing."""
    request_tokens: int = 65536
    """Tokens that a request may have; about as many are answered at once."""
    queue: int = 256
    """Requests that may wait; more are refused, and their callers try again."""

    def __post_init__(self):
        if not 0 <= self.port < 65536 or min(self.request_tokens, self.queue) < 1:
            raise ValueError("serve.port must be 0 to 65535, serve.request-tokens and serve.queue 1 or more.")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("serve.tls-cert and serve.tls-key come together; give both files or none.")
        if self.host not in LOOPBACK and not (self.token_file or self.insecure):
            raise ValueError(
                f"serve.host is {self.host}, where others can call; give --serve.token-file FILE, or --serve.insecure "
                "to let everybody."
            )


@dataclass(frozen=True, kw_only=True)
class Config(ModelToolConfig):
    serve: ServeConfig = field(default_factory=ServeConfig)


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    token_file: str = ""
    """File with the secret of the service."""
    tls_ca: str = ""
    """PEM file of the certificates that its own is signed by."""


@dataclass(frozen=True, kw_only=True)
class CriticServeConfig(Config):
    critic: CriticConfig = field(default_factory=CriticConfig)
    output: Path | None = None
    """Folder for its checkpoints; default runs/critic-<time>."""
    resume: bool = False
    """Go on from the newest checkpoint in --output, if there is one."""
    resume_step: int | None = None
    """Go on from the checkpoint of this step instead; newer ones are renamed."""


def serve_reward(argv: list[str]) -> int:
    config = options.parse(Config, argv)
    job, where = _prepare(config)
    model = open_reward_model(job, job.folder)
    return _serve(config.serve, RewardService(model, _digests(job), _limits(job), config.serve.queue), where)


def serve_critic(argv: list[str]) -> int:
    config = options.parse(CriticServeConfig, argv)
    c = config.serve
    job, where = _prepare(config)
    goes_on = config.resume and config.output and (training.steps(config.output) or config.resume_step is not None)
    checkpoint = training.latest(config.output, config.resume_step) if goes_on else None
    begun = training.read_plain(checkpoint) if checkpoint else {"plain": {}}
    started = bool(config.resume and config.output and (config.output / CONFIG).exists())
    needed_bytes = 2 * job.shape.num_bytes()
    path = RunDirectory.create(config.output, "critic", options.to_yaml(config), started, needed_bytes).path
    if checkpoint and is_main():
        training.set_aside(checkpoint)
    critic = local_critic(job, config.critic)
    if checkpoint:
        training.restore(checkpoint, {"critic": critic})
    settings = critic_settings(job, config.critic)
    shared = {"settings": settings, "folder": path, "begun": begun["plain"]}
    return _serve(c, CriticService(critic, _digests(job), _limits(job), c.queue, **shared), where)


def _prepare(config: Config) -> tuple[Job, dict]:
    """The joined job, and where to listen: what is wrong with the options is told before anything is loaded."""
    c = config.serve
    token = read_secret(c.token_file, "serve.token-file") if c.token_file else ""
    tls = (read_bytes(c.tls_key, "serve.tls-key"), read_bytes(c.tls_cert, "serve.tls-cert")) if c.tls_cert else None
    job = Job("serve", config)
    if c.host not in LOOPBACK and not tls:
        print("warning: without --serve.tls-cert tokens, numbers and the secret travel in the clear", file=sys.stderr)
    job.join()
    return job, {"host": c.host, "port": c.port, "token": token, "tls": tls, "calls": c.queue + 16}


def _limits(job: Job) -> Limits:
    tokens = job.config.serve.request_tokens
    return Limits(vocabulary=job.shape.vocab, context=job.shape.context, tokens=tokens)


def _digests(job: Job) -> dict[str, str]:
    return {"model": fingerprint(job.folder), "tokenizer": digest(job.tokenizer)}


def _serve(c: ServeConfig, service: RewardService | CriticService, where: dict) -> int:
    """Listen and work until told to stop."""
    stop = threading.Event()
    where |= {"request_bytes": service.request_bytes}
    started = agree(lambda: grpc_transport.serve(service, service.endpoints, **where) if is_main() else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if started:
        if c.metrics_port is not None:
            print(f"metrics: http://{c.host}:{service.metrics.publish(c.host, c.metrics_port)}/metrics")
        print(f"ready: {c.host}:{started[1]}", flush=True)
    service.run(stop)
    if started:
        started[0].stop(GRACE_S).wait()
        print("stopped: nothing was left to answer", flush=True)
    return 0


def show_status(argv: list[str]) -> int:
    if not argv or argv[0].startswith("--"):
        raise ValueError("got no address; write `python -m aligner.serve status host:port`.")
    config = options.parse(StatusConfig, argv[1:])
    token = read_secret(config.token_file, "token-file") if config.token_file else ""
    authority = read_bytes(config.tls_ca, "tls-ca") if config.tls_ca else None
    connection = grpc_transport.Connection(argv[0], token=token, authority=authority)
    try:
        status = ServiceStatus.of(connection.call(STATUS, {}, 5.0))
    except ServiceError as error:
        print(f"{argv[0]}: not ready: {error} ({error.code.value})", file=sys.stderr)
        return 1
    print(options.to_yaml(status).strip())
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"reward": serve_reward, "critic": serve_critic, "status": show_status}
    if not argv or argv[0] not in commands:
        raise ValueError(
            f"got {argv[0] if argv else 'nothing'!r}, expected `aligner.serve reward`, `critic` or `status`."
        )
    return commands[argv[0]](argv[1:])


if __name__ == "__main__":
    options.user_errors(main)
