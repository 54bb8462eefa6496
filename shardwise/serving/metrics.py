"""Metrics: what a server counts, in the text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one server."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "shardwise_requests", "Requests by status; 499 is a client that left", ["status"],
            registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "shardwise_request_seconds", "From the first byte of a request to its answer, where it got outputs",
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self._samples = Counter("shardwise_samples", "Samples computed", registry=registry)
        self._tokens = Counter("shardwise_new_tokens", "Tokens generated, of requests that got them", registry=registry)
        self._batches = Histogram(
            "shardwise_batch_samples", "Samples of a batch that was computed", registry=registry, buckets=_SAMPLES
        )
        self._computing = Histogram(
            "shardwise_batch_seconds", "From sending a batch to its replica to its outputs", registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self._restarts = Counter("shardwise_restarts", "Replicas that were started again", registry=registry)
        self._restart_seconds = Gauge(
            "shardwise_restart_seconds", "From the end of a replica until it answered again, the last time",
            registry=registry,
        )  # fmt: skip
        self._waiting = Gauge("shardwise_waiting_samples", "Samples that no replica has yet", registry=registry)
        self._ready = Gauge("shardwise_replicas_ready", "Replicas that answer", registry=registry)

    def watch(self, *, waiting: Callable[[], float], ready: Callable[[], float]) -> None:
        """Where the numbers of now are asked."""
        self._waiting.set_function(waiting)
        self._ready.set_function(ready)

    def request(self, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def tokens(self, count: int) -> None:
        """Tokens were generated, and answered."""
        self._tokens.inc(count)

    def batch(self, samples: int, seconds: float) -> None:
        """A batch was computed."""
        self._samples.inc(samples)
        self._batches.observe(samples)
        self._computing.observe(seconds)

    def restart(self, seconds: float) -> None:
        """A replica answers again."""
        self._restarts.inc()
        self._restart_seconds.set(seconds)

    def samples(self) -> int:
        """How many were computed."""
        return int(self._registry.get_sample_value("shardwise_samples_total") or 0)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
