"""Metrics of the service for Prometheus, and its log.

The metrics are requests by path and status, their durations, and the batcher's totals. The log has a line per request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from las_fast.serve.batcher import Batcher

BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)  # seconds at the upper ends of the histogram's buckets
ABORTED = 499  # status that counts requests whose client has disconnected, as in nginx
AUDIO_SECONDS = "las_fast.audio_seconds"  # key of a request's scope: duration of the recording that was transcribed

log = logging.getLogger("las_fast.serve")


class Metrics:
    """The metrics of one service."""

    def __init__(self, batcher: Batcher):
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry, "namespace": "las_fast"}
        self.requests = Counter("requests", "Requests that are finished.", ["path", "status"], **options)
        self.seconds = Histogram("request_seconds", "Duration of a request.", ["path"], buckets=BUCKETS, **options)
        self.in_progress = Gauge("requests_in_progress", "Recordings uploading, waiting or decoding.", **options)
        self.registry.register(_BatcherCollector(batcher))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _BatcherCollector(Collector):
    """Reads the batcher's totals whenever the metrics are asked for."""

    def __init__(self, batcher: Batcher):
        self.batcher = batcher

    def collect(self) -> Iterator[Metric]:
        totals = self.batcher.totals
        for name, text, value in (
            ("batches", "Batches of segments decoded.", totals.batches),
            ("segments", "Segments of speech decoded.", totals.segments),
            ("audio_seconds", "Seconds of audio read.", totals.audio_seconds),
            ("speech_seconds", "Seconds of speech decoded.", totals.speech_seconds),
            ("busy_seconds", "Seconds spent decoding.", totals.busy_seconds),
        ):
            yield CounterMetricFamily(f"las_fast_{name}", text, value=value)


class ObserveRequests:
    """ASGI middleware that counts the requests, measures their durations and logs them.

    Args:
        path_of: maps the path of a request to its label in metrics and log. Unknown paths should share one: each label
                 has a metric of its own, and a path may hold the name of a client's file.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, path_of: Callable[[str], str]):
        self.app, self.metrics, self.path_of = app, metrics, path_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, is_complete = time.monotonic(), 0, False

        async def watch(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:  # Starlette answers 500, outside of this middleware, unless a stream has begun
            if not isinstance(error.__cause__, ClientDisconnect):
                status, is_complete = 500, True
            raise
        finally:
            self._observe(scope, status if is_complete else ABORTED, time.monotonic() - began)

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        path = self.path_of(scope["path"])
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        audio = f", {scope[AUDIO_SECONDS]:.1f} s of audio" if AUDIO_SECONDS in scope else ""
        log.info("%s %s %d%s in %.2f s", scope["method"], path, status, audio, seconds)
