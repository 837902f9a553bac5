"""What every call has in common: errors become statuses, each call is logged, secrets stay out of both."""

from __future__ import annotations

import asyncio
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, cast

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from vmruntime import tracing
from vmruntime.errors import InvalidArgument, NotFound, Unimplemented, VmruntimeError
from vmruntime.metrics.instruments import OPERATIONS

log = structlog.get_logger(__name__)

# A status travels in HTTP/2 headers, of which peers accept 8 KiB in all, percent-encoded (gRPC over HTTP/2).
_MESSAGE_LIMIT = 2000
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# What kubelet asks every few seconds; logged only for those who look for it.
_QUIET = frozenset(
    {
        "Version",
        "Status",
        "RuntimeConfig",
        "PodSandboxStatus",
        "ListPodSandbox",
        "StreamPodSandboxes",
        "ContainerStatus",
        "ListContainers",
        "StreamContainers",
        "ContainerStats",
        "ListContainerStats",
        "StreamContainerStats",
        "ExecSync",
        "ListImages",
        "StreamImages",
        "ImageStatus",
        "ImageFsInfo",
        "ListImageUse",
        "ListTracedPods",
        "GetPodTrace",
    }
)
# Request fields that say what a call is about. Nothing else of a request is ever logged.
_BOUND = {"pod_sandbox_id": "pod", "container_id": "container"}
_ATTRIBUTES = {"pod": "vmruntime.sandbox.id", "container": "container.id"}
# Answers that are no failure of anybody: what is asked for is not there, or not wanted any more.
_HARMLESS = frozenset({"OK", "CANCELLED", "NOT_FOUND"})


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, type-arg, unused-ignore]
    """Turns a VmruntimeError into its gRPC status, anything else into INTERNAL with an id to look up in the log.

    Requests are also decoded here, since gRPC itself answers one that cannot be decoded with INTERNAL.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler; an unknown method stays unknown."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _unary(method, handler), response_serializer=handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _stream(method, handler), response_serializer=handler.response_serializer
            )
        return handler  # CRI has no method whose requests are a stream


def _unary(path: str, handler: Any) -> Any:
    async def call(raw: bytes, context: Any) -> Any:
        failure: VmruntimeError | _Defect
        with _traced(path, context, current=True) as outcome, _logged(path, outcome):
            request: Message | None = None
            try:
                request = _decode(handler.request_deserializer, raw)
                _bind(request)
                return await handler.unary_unary(request, context)
            except VmruntimeError as error:
                failure = error
            except Exception as error:
                failure = _defect(error, request)
            message = outcome.failed(failure, request)
        return await context.abort(_status(failure), message)  # raises

    return call


def _stream(path: str, handler: Any) -> Any:
    async def call(raw: bytes, context: Any) -> AsyncIterator[Any]:
        failure: VmruntimeError | _Defect | None = None
        message = ""
        with _traced(path, context, current=False) as outcome, _logged(path, outcome):
            request: Message | None = None
            try:
                request = _decode(handler.request_deserializer, raw)
                _bind(request)
                async with aclosing(handler.unary_stream(request, context)) as items:
                    async for item in items:
                        yield item
            except VmruntimeError as error:
                failure = error
            except Exception as error:
                failure = _defect(error, request)
            if failure is not None:
                message = outcome.failed(failure, request)
        if failure is not None:
            await context.abort(_status(failure), message)

    return call


def _decode(deserializer: Callable[[bytes], Message], raw: bytes) -> Message:
    try:
        return deserializer(raw)
    except DecodeError:
        raise InvalidArgument("the request is not a valid message of this method") from None


def _bind(request: Message) -> None:
    known = request.DESCRIPTOR.fields_by_name
    values = {
        key: str(getattr(request, field))[:64]
        for field, key in _BOUND.items()
        if field in known and getattr(request, field)
    }
    structlog.contextvars.bind_contextvars(**values)
    if tracing.exporting():
        tracing.annotate({_ATTRIBUTES[key]: value for key, value in values.items()})


class _Defect:
    """An exception nobody meant to raise, as the log and the client see it."""

    def __init__(self, message: str, details: str) -> None:
        self.message = message
        self.details = details


def _defect(error: Exception, request: Message | None) -> _Defect:
    # The text of the traceback is made here: a log renderer might add local variables, and with them credentials.
    number = secrets.token_hex(4)
    details = "".join(traceback.format_exception(error))
    return _Defect(
        f"internal error {number}; the daemon's log has the details under this number",
        f"{number}\n{_redact(details, request)}",
    )


def _status(failure: VmruntimeError | _Defect) -> grpc.StatusCode:
    if isinstance(failure, _Defect):
        return grpc.StatusCode.INTERNAL
    return _CODES[failure.code.value]


def _redact(message: str, request: Message | None) -> str:
    """Blot out the credentials a request came with, wherever a program's output may have repeated them."""
    if request is None or "auth" not in request.DESCRIPTOR.fields_by_name:
        return message
    auth = cast(Any, request).auth
    for field in ("password", "auth", "identity_token", "registry_token"):
        if value := getattr(auth, field):
            message = message.replace(value, "…").replace(repr(value)[1:-1], "…")
    return message


class _Outcome:
    """What became of a call."""

    def __init__(self) -> None:
        self.failure: VmruntimeError | _Defect | None = None
        self.message = ""
        self.cancelled = False

    @property
    def code(self) -> grpc.StatusCode:
        """What the client is answered."""
        if self.cancelled:
            return grpc.StatusCode.CANCELLED
        return grpc.StatusCode.OK if self.failure is None else _status(self.failure)

    def failed(self, failure: VmruntimeError | _Defect, request: Message | None) -> str:
        """Remember the failure and return the message for the client."""
        text = failure.message if isinstance(failure, _Defect) else str(failure)
        self.failure = failure
        self.message = _cut(_redact(text, request))
        return self.message


def _cut(message: str) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) <= _MESSAGE_LIMIT:
        return encoded.decode()  # not the message itself: it may have what gRPC cannot encode
    return encoded[:_MESSAGE_LIMIT].decode(errors="ignore") + "…"


@contextmanager
def _traced(path: str, context: Any, *, current: bool) -> Iterator[_Outcome]:
    """Make the call a part of its caller's trace; see tracing.served()."""
    outcome = _Outcome()
    # Every request has metadata; reading it is left out when nobody wants it.
    metadata = dict(context.invocation_metadata() or ()) if tracing.exporting() else {}
    with tracing.served(path, metadata, current=current) as span:
        try:
            yield outcome
        finally:
            code = outcome.code
            span.answered(code.value[0], failed=code.name not in _HARMLESS, message=outcome.message or code.name)


@contextmanager
def _logged(path: str, outcome: _Outcome) -> Iterator[None]:
    """Log one call with its duration when it is over, however it ends."""
    method = path.rsplit("/", 1)[-1]
    started = time.monotonic()
    with structlog.contextvars.bound_contextvars(method=method):
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            outcome.cancelled = True
            log.info("cri call cancelled", duration_ms=_since(started))
            raise
        else:
            _report(outcome, method, _since(started))
        finally:
            OPERATIONS.labels(method, outcome.code.name).observe(time.monotonic() - started)
            structlog.contextvars.unbind_contextvars(*_BOUND.values())


def _report(outcome: _Outcome, method: str, duration_ms: float) -> None:
    failure = outcome.failure
    if failure is None:
        report = log.debug if method in _QUIET else log.info
        report("cri call done", duration_ms=duration_ms)
    elif isinstance(failure, _Defect):
        log.error("cri call failed", duration_ms=duration_ms, code="INTERNAL", details=failure.details)
    else:
        # A missing id or an unbuilt method is the client's news, not ours.
        report = log.info if isinstance(failure, NotFound | Unimplemented) else log.warning
        report("cri call failed", duration_ms=duration_ms, code=failure.code.name, error=outcome.message)


def _since(started: float) -> float:
    return round((time.monotonic() - started) * 1000, 3)
