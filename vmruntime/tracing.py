"""Spans: what a call did and how long each part of it took.

The recorder keeps those of calls on pods in memory, always (recorder.py). They also go to OpenTelemetry once `use` is given a
tracer, which only a daemon with [tracing] does. Spans nest by context variables, which tasks inherit from whoever starts
them. Attributes have the names of OpenTelemetry's semantic conventions where these have one, else `vmruntime.*`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import types
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, ParamSpec, TypeVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vmruntime.errors import VmruntimeError
from vmruntime.recorder import Attributes, Call, Part, PodNames, Recorder

P = ParamSpec("P")
T = TypeVar("T")

RECORDER = Recorder()

_tracer: Tracer | None = None
_propagator = TraceContextTextMapPropagator()
# The call that is going on, and the part of it; None: no more parts of it are taken down.
_going_on: ContextVar[tuple[Call, Part | None] | None] = ContextVar("going_on", default=None)


def use(tracer: Tracer | None) -> None:
    """Send spans with this tracer from now on; None: send none."""
    global _tracer
    _tracer = tracer


def exporting() -> bool:
    """Whether spans are sent: gathering what only a collector wants may be left out otherwise."""
    return _tracer is not None


class _Span:
    # A class: a generator's context manager would cost more than all that is done here.
    __slots__ = ("_attributes", "_exported", "_name", "_part", "_token")

    def __init__(self, name: str, attributes: Attributes | None) -> None:
        self._name = name
        self._attributes = attributes
        self._part: Part | None = None
        self._token: Token[tuple[Call, Part | None] | None] | None = None
        self._exported: contextlib.AbstractContextManager[Span] | None = None

    def __enter__(self) -> None:
        going_on = _going_on.get()
        if going_on is None or not going_on[0].open:
            return
        if _tracer is not None:
            self._exported = _tracer.start_as_current_span(
                self._name, attributes=self._attributes, record_exception=False, set_status_on_exception=False
            )
            self._exported.__enter__()
        call, outer = going_on
        if outer is not None:
            self._part = call.begin(outer, self._name, self._attributes, time.monotonic())
        self._token = _going_on.set((call, self._part))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: types.TracebackType | None
    ) -> None:
        if self._token is not None:
            _going_on.reset(self._token)
        if self._part is not None:
            self._part.end = time.monotonic()
            if error is not None:
                self._part.error = _words(error)
        if self._exported is not None:
            if error is not None:
                trace.get_current_span().set_status(Status(StatusCode.ERROR, _words(error)))
            self._exported.__exit__(kind, error, where)


def span(name: str, attributes: Attributes | None = None) -> contextlib.AbstractContextManager[None]:
    """Time a block as part of the call that is going on; an error that leaves it is noted. Without a call: nothing.

    Args:
        name: Of the kind of work; what it is about is for the attributes.
        attributes: Not to be changed any more.
    """
    return _Span(name, attributes)


def timed(name: str) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Have a span of this name around whatever an async function does."""

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return await function(*args, **kwargs)

        return call

    return decorate


def annotate(attributes: Attributes) -> None:
    """Add attributes to the span that is going on, where it is sent."""
    if _tracer is not None:
        trace.get_current_span().set_attributes(attributes)


def about(pod: PodNames, attributes: Attributes) -> None:
    """Say which pod the call that is going on is about, so that it is kept, and what else is known of it."""
    annotate(attributes)
    if (going_on := _going_on.get()) is not None:
        going_on[0].attributes.update(attributes)
        RECORDER.keep(going_on[0], pod)


def measured(began: float, parts: Sequence[tuple[str, float, float]]) -> None:
    """Add parts to what is going on that somebody else has measured, while he was waited for.

    Args:
        began: When waiting for him began, by time.monotonic().
        parts: Name, seconds after he began, and duration of each. His beginning and his end are taken to be as far from ours;
            what does not fit in between is cut off.
    """
    going_on = _going_on.get()
    if not parts or going_on is None or not going_on[0].open:
        return
    call, outer = going_on
    now = time.monotonic()
    lead = began + max(0.0, now - began - max(offset + duration for _, offset, duration in parts)) / 2
    wall = time.time() - now
    for name, offset, duration in parts:
        start = min(lead + offset, now)
        end = min(start + duration, now)
        if _tracer is not None:
            _tracer.start_span(name, start_time=int((wall + start) * 1e9)).end(int((wall + end) * 1e9))
        if outer is not None and (part := call.begin(outer, name, None, start)) is not None:
            part.end = end


@contextlib.contextmanager
def outliving() -> Iterator[None]:
    """Have a block be part of the call that is going on to its end, though the caller may go away before."""
    if (going_on := _going_on.get()) is None:
        yield
        return
    going_on[0].open += 1
    try:
        yield
    finally:
        going_on[0].open -= 1


class Served:
    """The span of a call that is being answered."""

    def __init__(self, current: Span, call: Call | None) -> None:
        self._span = current
        self._call = call

    def answered(self, code: int, *, failed: bool, message: str = "") -> None:
        """Note the answer.

        Args:
            code: gRPC's status code.
            failed: Whether that counts as an error.
            message: What the client is told, unless the code is 0; without secrets.
        """
        if self._call is not None and code != 0:
            self._call.whole.error = message
        self._span.set_attribute("rpc.grpc.status_code", code)
        if failed:
            self._span.set_status(Status(StatusCode.ERROR, message))


@contextlib.contextmanager
def served(path: str, metadata: Mapping[str, str], *, current: bool) -> Iterator[Served]:
    """Time the answering of a gRPC call, where it is sent as part of its caller's trace.

    Args:
        path: "/package.Service/Method".
        metadata: Of the call; `traceparent` and `tracestate` say which trace it belongs to (W3C Trace Context).
        current: Whether spans made meanwhile are parts of it. Not for generators, whose body runs in pieces.
    """
    service, _, method = path.strip("/").partition("/")
    with contextlib.ExitStack() as stack:
        exported: Span = trace.INVALID_SPAN
        if _tracer is not None:
            exported = _exported(_tracer, service, method, metadata)
            stack.callback(exported.end)
            if current:
                stack.enter_context(
                    trace.use_span(exported, end_on_exit=False, record_exception=False, set_status_on_exception=False)
                )
        yield Served(exported, stack.enter_context(_recorded(method)) if current else None)


@contextlib.contextmanager
def _recorded(method: str) -> Iterator[Call]:
    call = Call(method)
    token = _going_on.set((call, call.whole))
    try:
        yield call
    finally:
        _going_on.reset(token)
        call.whole.end = time.monotonic()
        call.open -= 1


def _exported(tracer: Tracer, service: str, method: str, metadata: Mapping[str, str]) -> Span:
    return tracer.start_span(
        f"{service}/{method}",
        # An empty context, not the present one: nothing of this process is the caller.
        context=_propagator.extract(metadata, Context()),
        kind=SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        record_exception=False,
        set_status_on_exception=False,
    )


def _words(error: BaseException) -> str:
    """Return what may be told of an error: others than our own may quote what was secret."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return str(error) if isinstance(error, VmruntimeError) else type(error).__name__
