"""A reward model as a service: `python -m aligner.serve reward --model runs/rm`, by torchrun for any layout.

Runs of the online programs, on this machine or on others, ask it with `--reward.url host:port`; docs/serving.md has the
contract. `python -m aligner.serve status host:port` says whether it is ready, and what it serves.
Its ranks end with status 0 after SIGTERM or Ctrl-C of one, once what waits is answered; with another one whenever else.
"""

import signal
import sys
import threading
from dataclasses import dataclass, field

from aligner.data.tokenizer import digest
from aligner.job.actor import open_reward_model
from aligner.job.config import ModelToolConfig
from aligner.job.job import Job
from aligner.job.reference import fingerprint
from aligner.run import config as options
from aligner.run.distributed import agree, is_main
from aligner.serving import grpc_transport
from aligner.serving.remote import read_bytes, read_secret
from aligner.serving.reward_service import RewardService
from aligner.serving.service import REWARD, STATUS, Limits, ServiceError, ServiceStatus

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


def serve_reward(argv: list[str]) -> int:
    config = options.parse(Config, argv)
    c, stop = config.serve, threading.Event()
    token = read_secret(c.token_file, "serve.token-file") if c.token_file else ""
    tls = (read_bytes(c.tls_key, "serve.tls-key"), read_bytes(c.tls_cert, "serve.tls-cert")) if c.tls_cert else None
    job = Job("serve", config)
    if c.host not in LOOPBACK and not tls:
        print("warning: without --serve.tls-cert tokens, rewards and the secret travel in the clear", file=sys.stderr)
    job.join()
    model = open_reward_model(job, job.folder)
    limits = Limits(vocabulary=job.shape.vocab, context=job.shape.context, tokens=c.request_tokens)
    digests = {"model": fingerprint(job.folder), "tokenizer": digest(job.tokenizer)}
    service = RewardService(model, digests, limits, c.queue)
    where = {"host": c.host, "port": c.port, "token": token, "tls": tls}
    where |= {"calls": c.queue + 16, "request_bytes": 16 * c.request_tokens + (1 << 16)}
    started = agree(lambda: grpc_transport.serve(service, (REWARD, STATUS), **where) if is_main() else None)
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
    commands = {"reward": serve_reward, "status": show_status}
    if not argv or argv[0] not in commands:
        raise ValueError(f"got {argv[0] if argv else 'nothing'!r}, expected `aligner.serve reward` or `status`.")
    return commands[argv[0]](argv[1:])


if __name__ == "__main__":
    options.user_errors(main)
