"""A collector of OpenTelemetry traces in memory: OTLP's TraceService on a real gRPC server, in threads of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclasses.dataclass(frozen=True)
class Collected:
    """One span as it arrived."""

    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    failed: bool
    message: str
    attributes: dict[str, Any]
    resource: dict[str, Any]

    def within(self, other: Collected) -> bool:
        """Whether this is a part of another span, by name of parent and by time."""
        return self.parent == other.id and other.start <= self.start <= self.end <= other.end


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span."""

    def __init__(self) -> None:
        self.address = ""
        self._spans: list[Collected] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            for resource in request.resource_spans:
                about = _plain(resource.resource.attributes)
                self._spans += [_collected(one, about) for scope in resource.scope_spans for one in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace: str = "") -> list[Collected]:
        """Return the spans so far, of one trace or all, in the order of their starts."""
        with self._lock:
            found = [one for one in self._spans if trace in ("", one.trace)]
        return sorted(found, key=lambda one: (one.start, -one.end))

    def wait(self, name: str, count: int = 1, seconds: float = 30.0) -> list[Collected]:
        """Return the spans of a name once there are so many."""
        deadline = time.monotonic() + seconds
        while len(found := [one for one in self.spans() if one.name == name]) < count:
            assert time.monotonic() < deadline, (name, [one.name for one in self.spans()])
            time.sleep(0.05)
        return found


def _collected(span: Any, resource: dict[str, Any]) -> Collected:
    return Collected(
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        message=span.status.message,
        attributes=_plain(span.attributes),
        resource=resource,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector."""
    kept = Collector()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]
    kept.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield kept
    finally:
        server.stop(None).wait()
