"""Spans: what a call did and how long each part of it took, for OpenTelemetry.

Nothing happens until `use` is given a tracer, which only a daemon with [tracing] does; a span then costs one comparison.
Spans nest by context variables, which tasks inherit from whoever starts them. Attributes have the names of OpenTelemetry's
semantic conventions where these have one, else `vmruntime.*`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vmruntime.errors import VmruntimeError

Attributes = Mapping[str, str | int | bool]

_tracer: Tracer | None = None
_propagator = TraceContextTextMapPropagator()


def use(tracer: Tracer | None) -> None:
    """Make spans with this tracer from now on; None: make none."""
    global _tracer
    _tracer = tracer


def enabled() -> bool:
    """Whether anybody sees spans: gathering attributes may be left out otherwise."""
    return _tracer is not None


@contextlib.contextmanager
def span(name: str, attributes: Attributes | None = None) -> Iterator[None]:
    """Time a block as part of what is going on; an error that leaves it is noted."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield
        except BaseException as error:
            current.set_status(Status(StatusCode.ERROR, _words(error)))
            raise


def annotate(attributes: Attributes) -> None:
    """Add attributes to the span that is going on."""
    if _tracer is not None:
        trace.get_current_span().set_attributes(attributes)


class Served:
    """The span of a call that is being answered."""

    def __init__(self, current: Span) -> None:
        self._span = current

    def answered(self, code: int, *, failed: bool, message: str = "") -> None:
        """Note the answer.

        Args:
            code: gRPC's status code.
            failed: Whether that counts as an error.
            message: What the client is told; without secrets.
        """
        self._span.set_attribute("rpc.grpc.status_code", code)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR, message))


_NOBODY = Served(trace.INVALID_SPAN)


@contextlib.contextmanager
def served(path: str, metadata: Mapping[str, str], *, current: bool) -> Iterator[Served]:
    """Time the answering of a gRPC call as part of its caller's trace.

    Args:
        path: "/package.Service/Method".
        metadata: Of the call; `traceparent` and `tracestate` say which trace it belongs to (W3C Trace Context).
        current: Whether spans made meanwhile are parts of it. Not for generators, whose body runs in pieces.
    """
    if _tracer is None:
        yield _NOBODY
        return
    service, _, method = path.strip("/").partition("/")
    made = _tracer.start_span(
        f"{service}/{method}",
        # An empty context, not the present one: nothing of this process is the caller.
        context=_propagator.extract(metadata, Context()),
        kind=SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        record_exception=False,
        set_status_on_exception=False,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(made.end)
        if current:
            stack.enter_context(
                trace.use_span(made, end_on_exit=False, record_exception=False, set_status_on_exception=False)
            )
        yield Served(made)


def _words(error: BaseException) -> str:
    """Return what may be told of an error: others than our own may quote what was secret."""
    return str(error) if isinstance(error, VmruntimeError) else type(error).__name__
