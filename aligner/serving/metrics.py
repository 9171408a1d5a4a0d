"""What a service counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
TOKENS = tuple(4**i for i in range(2, 11))


class ServiceMetrics:
    """Counters of one service, under names that begin with aligner_.

    requests: by endpoint and code, OK where it was answered. tokens: answered. batch_tokens: answered at once.
    queue_seconds: from a request's arrival to the start of its batch. compute_seconds: of a batch.
    swap_seconds: of making room for a model, where two take turns on the device.
    weights_version: of the weights that answer.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        shared = {"registry": self.registry, "namespace": "aligner"}
        self.requests = Counter("requests", "Calls by endpoint and code.", ("endpoint", "code"), **shared)
        self.tokens = Counter("tokens", "Tokens of answered requests.", **shared)
        self.batch_tokens = Histogram("batch_tokens", "Tokens answered at once.", buckets=TOKENS, **shared)
        self.queue_seconds = Histogram("queue_seconds", "Seconds that a request waits.", buckets=SECONDS, **shared)
        self.compute_seconds = Histogram("compute_seconds", "Seconds of a batch.", buckets=SECONDS, **shared)
        self.swap_seconds = Histogram("swap_seconds", "Seconds of changing models.", buckets=SECONDS, **shared)
        self.weights_version = Gauge("weights_version", "Of the weights that answer.", **shared)

    def publish(self, host: str, port: int) -> int:
        """Answer `GET /metrics` there from a thread; the port, which for 0 is a free one.

        Raises ValueError when it cannot listen.
        """
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ValueError(
                f"cannot publish metrics on {host}:{port} ({error.strerror}); choose another port."
            ) from None
        return server.server_port
