"""What all conversations with an agent share: the channel's options, and gRPC's failures in vmruntime's terms."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from vmruntime.agent import checks
from vmruntime.agent.errors import AgentError, AgentGone, AgentLied, AgentSilent, closed_is_gone
from vmruntime.errors import Code
from vmruntime.generated import agent_pb2

T = TypeVar("T")

SERVICE = agent_pb2.DESCRIPTOR.services_by_name["Agent"]

WRITE_FAILED = "Internal error from Core"
"""What grpc.aio says, in place of the true end, when a stream was at its end before something was written to it."""

GRPCS_OWN = "Deadline Exceeded"
"""What grpc.aio says of a call whose time is up; the agent has other words for what took its processes too long."""

CHANNEL_OPTIONS = [
    # grpc would send the percent-coded socket path, which HTTP/2 servers other than its own refuse as malformed.
    ("grpc.default_authority", "localhost"),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # In spite of its name, how long a connection may take to come up.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", 16 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(socket: Path) -> grpc.aio.Channel:
    """Return a channel with a connection of its own."""
    return grpc.aio.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)


class Stub:
    """The agent's methods under their names, like the generated stub, but for answers that are no messages.

    For those grpc.aio would write a traceback into the log, as often as a guest likes, and hand out None. Here they are
    None quietly, and call() and messages() tell what that means.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._methods = {method.name: _callable(channel, method) for method in SERVICE.methods}

    def __getattr__(self, name: str) -> Any:
        return self._methods[name]


def _callable(channel: grpc.aio.Channel, method: MethodDescriptor) -> Any:
    ends = [("stream" if streaming else "unary") for streaming in (method.client_streaming, method.server_streaming)]
    answer = GetMessageClass(method.output_type)

    def deserialize(data: bytes) -> Message | None:
        try:
            return answer.FromString(data)
        except DecodeError:
            return None

    return getattr(channel, "_".join(ends))(
        f"/{SERVICE.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=deserialize,
    )


async def call(work: Awaitable[T | None]) -> T:
    """Await the answer of a call.

    Raises:
        AgentError: The agent refused; AgentGone when it cannot be reached; AgentLied when the answer is no message.
    """
    return _message(await sent(work))


async def sent(work: Awaitable[T]) -> T:
    """Await a write or the like.

    Raises:
        AgentError: The stream has ended; AgentGone when the agent cannot be reached.
    """
    try:
        with closed_is_gone():
            return await work
    except grpc.aio.AioRpcError as error:
        raise translate(error) from error
    except asyncio.CancelledError:
        raise _cancelled() from None
    except asyncio.InvalidStateError as error:  # grpc.aio: the stream has ended under a write
        raise AgentGone("the connection to the guest agent ended") from error
    except grpc.aio.UsageError as error:
        raise AgentGone("the connection to the guest agent is closed") from error


async def messages(stream: Any) -> AsyncIterator[Any]:
    """Iterate over a stream's messages; raises as call() does."""
    received = aiter(stream)
    try:
        while True:
            with closed_is_gone():
                message = await anext(received)
            yield _message(message)
    except StopAsyncIteration:
        return
    except grpc.aio.AioRpcError as error:
        raise translate(error) from error
    except asyncio.CancelledError:
        raise _cancelled() from None


def _message(received: T | None) -> T:
    if received is None:
        raise AgentLied("an answer is no message of the protocol")
    return received


def _cancelled() -> BaseException:
    """Return what a cancelled call means: its task was cancelled, or the channel was closed under the call.

    grpc.aio raises CancelledError for both; taken for the first, the second would leave a caller without any answer.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return asyncio.CancelledError()
    return AgentGone("the connection to the guest agent was closed")


def translate(error: grpc.aio.AioRpcError) -> AgentError:
    """Return the error of a call in vmruntime's terms."""
    status = error.code()
    details = checks.shown(error.details() or "")
    if status is grpc.StatusCode.UNAVAILABLE:
        return AgentGone(f"the guest agent does not answer: {details}")
    if status is grpc.StatusCode.INTERNAL and details == WRITE_FAILED:
        return AgentGone("the connection to the guest agent ended under a write")
    if status is grpc.StatusCode.CANCELLED:
        return AgentGone("the connection to the guest agent was closed")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED and GRPCS_OWN in details:
        return AgentSilent()
    try:
        return AgentError(details or status.name, Code[status.name])
    except KeyError:
        return AgentError(f"{status.name}: {details}", Code.INTERNAL)
