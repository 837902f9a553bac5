"""What all conversations with an agent share: the channel's options, and gRPC's failures in vmruntime's terms."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from vmruntime.agent import checks
from vmruntime.agent.errors import AgentError, AgentGone, closed_is_gone
from vmruntime.errors import Code

T = TypeVar("T")

WRITE_FAILED = "Internal error from Core"
"""What grpc.aio says, in place of the true end, when a stream was at its end before something was written to it."""

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


async def call(work: Awaitable[T]) -> T:
    """Await a call, a write or the like.

    Raises:
        AgentError: The agent refused; AgentGone when it cannot be reached.
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
            yield message
    except StopAsyncIteration:
        return
    except grpc.aio.AioRpcError as error:
        raise translate(error) from error
    except asyncio.CancelledError:
        raise _cancelled() from None


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
    try:
        return AgentError(details or status.name, Code[status.name])
    except KeyError:
        return AgentError(f"{status.name}: {details}", Code.INTERNAL)
