"""Sends spans to a collector by OTLP over gRPC, in a thread of OpenTelemetry's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import structlog

from vmruntime import __version__, tracing
from vmruntime.config.settings import TracingSettings

log = structlog.get_logger(__name__)

MILLION = 1_000_000
EXPORT_SECONDS = 5.0
LAST_SECONDS = 2.0
"""What the last spans get when the daemon stops; a collector that is away must not hold it up."""
QUIET_SECONDS = 300.0


@contextlib.asynccontextmanager
async def tracing_to(settings: TracingSettings) -> AsyncIterator[None]:
    """Trace meanwhile, if the settings say where to; the rest is not even imported otherwise."""
    if not settings.endpoint:
        yield
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    _quieten()
    insecure = urlsplit(settings.endpoint).scheme != "https"
    exporter = OTLPSpanExporter(endpoint=settings.endpoint, insecure=insecure, timeout=EXPORT_SECONDS)
    provider = TracerProvider(
        # A caller's decision holds; the rate is for calls that belong to no trace yet, as with kubelet's own.
        sampler=ParentBased(TraceIdRatioBased(settings.sampling_rate_per_million / MILLION)),
        resource=Resource.create(
            {"service.name": "vmruntime", "service.version": __version__, "host.name": os.uname().nodename}
        ),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracing.use(provider.get_tracer("vmruntime", __version__))
    log.info("tracing", endpoint=settings.endpoint, sampling_rate_per_million=settings.sampling_rate_per_million)
    try:
        yield
    finally:
        tracing.use(None)
        ending = asyncio.ensure_future(asyncio.to_thread(provider.shutdown))
        # Woken by: the last spans' arrival, or the end of patience.
        _, unfinished = await asyncio.wait({ending}, timeout=LAST_SECONDS)
        if unfinished:
            await asyncio.to_thread(exporter.shutdown)  # gives up what is under way
            await ending


class _Seldom(logging.Filter):
    """Lets a message pass once in a while: a collector that is away is one piece of news, not one every few seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._last = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record passes."""
        now = time.monotonic()
        if record.levelno < logging.ERROR or now - self._last < QUIET_SECONDS:
            return False
        self._last = now
        return True


def _quieten() -> None:
    # Filters of a logger do not see what its children say, so each that reports failed exports has its own.
    for name in ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Seldom) for known in logger.filters):
            logger.addFilter(_Seldom())
