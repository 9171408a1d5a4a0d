"""Where a service listens, and by which transport."""

import os
import sys
import threading
from dataclasses import dataclass
from typing import Literal

from aligner.run.secret import read_bytes, read_secret
from aligner.serving import grpc_transport, triton_transport
from aligner.serving.grpc_transport import GrpcServer, Tls
from aligner.serving.service import Service
from aligner.serving.triton_transport import TritonServer

LOOPBACK = ("127.0.0.1", "localhost", "::1")
WATCH_S = 1.0  # between looks at Triton
DIED = 70  # exit status when it has ended by itself: "internal software error" of sysexits.h


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
    tls_client_ca: str = ""
    """PEM file of certificates; with it every caller must show one that is signed by them."""
    transport: Literal["grpc", "pytriton"] = "grpc"
    """Who listens: this process, or Triton, which callers then name as triton://host:port."""
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
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("serve.tls-client-ca needs --serve.tls-cert and --serve.tls-key; give them too.")
        if self.host not in LOOPBACK and not (self.token_file or self.insecure):
            raise ValueError(
                f"serve.host is {self.host}, where others can call; give --serve.token-file FILE, or --serve.insecure "
                "to let everybody."
            )

    def where(self) -> dict:
        """Where to listen, for both transports. Raises ValueError when a file cannot be read."""
        token = read_secret(self.token_file, "serve.token-file") if self.token_file else ""
        files = {"key": "tls-key", "chain": "tls-cert", "authority": "tls-client-ca"}
        given = {name: getattr(self, option.replace("-", "_")) for name, option in files.items()}
        read = {name: read_bytes(file, f"serve.{files[name]}") for name, file in given.items() if file}
        if self.host not in LOOPBACK and not read:
            print("warning: without --serve.tls-cert numbers and the secret travel in the clear", file=sys.stderr)
        tls = Tls(**read) if read else None
        return {"host": self.host, "port": self.port, "token": token, "tls": tls, "calls": self.queue + 16}


def listen(c: ServeConfig, service: Service, where: dict) -> GrpcServer | TritonServer:
    if c.transport == "pytriton":
        service.request_bytes = min(service.request_bytes, triton_transport.most_bytes())
        return TritonServer(service, service.endpoints, **where)
    return grpc_transport.serve(service, service.endpoints, request_bytes=service.request_bytes, **where)


def watch(server: GrpcServer | TritonServer, stop: threading.Event) -> None:
    """End this process, and with it all ranks, when what listens has died: nobody could call any more."""
    while not stop.wait(WATCH_S):
        if not server.alive():
            print("error: Triton has ended; start the service again", file=sys.stderr, flush=True)
            os._exit(DIED)
