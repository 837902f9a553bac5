"""Failures of the guest agent, as the host sees them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from vmruntime.errors import Code, VmruntimeError


class AgentError(VmruntimeError):
    """Raised when the agent refused; `code` is the one it gave, the message its words."""

    def __init__(self, message: str, code: Code) -> None:
        super().__init__(message)
        self.code = code


class AgentGone(AgentError):
    """Raised when the agent cannot be reached: its VM ended or the connection broke."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Code.UNAVAILABLE)


class AgentSilent(AgentError):
    """Raised when the agent has not answered in time: its guest is held, overloaded or stuck."""

    def __init__(self) -> None:
        super().__init__("the guest agent has not answered in time", Code.DEADLINE_EXCEEDED)
        self.remedy = "the guest may be overloaded or stuck: see vmruntime console, and the load of the host"


class AgentLied(AgentError):
    """Raised when an answer breaks the protocol: nothing a guest says is trusted."""

    def __init__(self, message: str) -> None:
        super().__init__(f"the guest agent broke the protocol: {message}", Code.INTERNAL)


@contextlib.contextmanager
def closed_is_gone() -> Iterator[None]:
    """Raise AgentGone where grpc.aio raises CancelledError because the channel was closed, not the task cancelled."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling() > 0:
            raise
        raise AgentGone("the connection to the guest agent was closed") from None
