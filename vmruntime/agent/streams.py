"""Conversations with an agent that carry a process's streams or a TCP connection.

Each session has a connection of its own, so that one whose process takes no input cannot hold up anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from vmruntime.agent import checks
from vmruntime.agent.calls import messages, sent
from vmruntime.agent.errors import AgentError, AgentLied
from vmruntime.generated import agent_pb2
from vmruntime.model.streams import AttachSpec, ExecEnd, ExecSpec, OutputChunk, TerminalSize

CHUNK_LIMIT = 64 * 1024
"""Bytes of one message towards the agent."""

TERMINAL_LIMIT = 65535
"""A terminal's largest size (struct winsize, ioctl_tty(2))."""


class Stream:
    """One bidirectional call.

    Writing never fails: a stream that has ended takes nothing more, and why it ended is the reader's to tell.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        # gRPC refuses a write while another is under way (GRPC_CALL_ERROR_TOO_MANY_OPERATIONS); input and sizes come
        # from two tasks.
        self._turn = asyncio.Lock()

    async def send(self, message: object) -> None:
        """Send a message; waits while the agent takes none."""
        with contextlib.suppress(AgentError):
            async with self._turn:
                await sent(self._stream.write(message))

    async def done(self) -> None:
        """Say that no more messages come."""
        with contextlib.suppress(AgentError):
            async with self._turn:
                await sent(self._stream.done_writing())

    def messages(self) -> AsyncIterator[Any]:
        """Iterate over the agent's messages."""
        return messages(self._stream)


class ExecStream:
    """Implements agent.interface.ExecStream."""

    def __init__(self, stream: Any) -> None:
        self._stream = Stream(stream)
        self._end: ExecEnd | None = None

    @property
    def end(self) -> ExecEnd:
        """How the command ended, once the output is at its end."""
        if self._end is None:
            raise AgentLied("a command's stream ended without its exit code")
        return self._end

    async def start(self, spec: ExecSpec) -> None:
        """Ask for the command."""
        start = agent_pb2.ExecStart(
            container_id=spec.container_id,
            args=spec.argv,
            tty=spec.tty,
            stdin=spec.stdin,
            timeout_ms=round(spec.timeout * 1000),
        )
        await self._stream.send(agent_pb2.ExecRequest(start=start))

    async def write(self, data: bytes) -> None:
        """Send input; waits while the command takes none."""
        for at in range(0, len(data), CHUNK_LIMIT):
            await self._stream.send(agent_pb2.ExecRequest(stdin=data[at : at + CHUNK_LIMIT]))

    async def close_input(self) -> None:
        """End the input."""
        await self._stream.send(agent_pb2.ExecRequest(stdin_closed=True))

    async def resize(self, size: TerminalSize) -> None:
        """Set the terminal's size."""
        await self._stream.send(agent_pb2.ExecRequest(resize=_size(size)))

    async def output(self) -> AsyncIterator[OutputChunk]:
        """Iterate over the output to its end; then `end` is known."""
        async for message in self._stream.messages():
            which = _kind(message, last=self._end is not None)
            if which == "started":
                yield OutputChunk(False, b"")
            elif which in ("stdout", "stderr"):
                yield OutputChunk(which == "stderr", getattr(message, which))
            else:
                self._end = ExecEnd(
                    exit_code=checks.number(message.exited.exit_code, "an exit code", 0, 255),
                    timed_out=message.exited.timed_out,
                    error=checks.shown(message.exited.error),
                )


class AttachStream:
    """Implements agent.interface.AttachStream."""

    def __init__(self, stream: Any) -> None:
        self._stream = Stream(stream)
        self.too_slow = False

    async def start(self, spec: AttachSpec) -> None:
        """Ask for the container's streams."""
        start = agent_pb2.AttachStart(
            container_id=spec.container_id, stdin=spec.stdin, stdout=spec.stdout, stderr=spec.stderr
        )
        await self._stream.send(agent_pb2.AttachRequest(start=start))

    async def write(self, data: bytes) -> None:
        """Send input; waits while the container takes none."""
        for at in range(0, len(data), CHUNK_LIMIT):
            await self._stream.send(agent_pb2.AttachRequest(stdin=data[at : at + CHUNK_LIMIT]))

    async def close_input(self) -> None:
        """End the input; what that means for the container was said when it was created."""
        await self._stream.send(agent_pb2.AttachRequest(stdin_closed=True))

    async def resize(self, size: TerminalSize) -> None:
        """Set the terminal's size."""
        await self._stream.send(agent_pb2.AttachRequest(resize=_size(size)))

    async def output(self) -> AsyncIterator[OutputChunk]:
        """Iterate over what the container writes from now on; the end says that there is no more."""
        ended = False
        async for message in self._stream.messages():
            which = _kind(message, last=ended)
            if which == "started":
                yield OutputChunk(False, b"")
            elif which in ("stdout", "stderr"):
                yield OutputChunk(which == "stderr", getattr(message, which))
            else:
                ended = True
                self.too_slow = message.ended.cause == agent_pb2.AttachEnded.TOO_SLOW


class PortStream:
    """Implements agent.interface.PortStream."""

    def __init__(self, stream: Any) -> None:
        self._stream = Stream(stream)
        self._messages = self._stream.messages()

    async def connect(self, port: int) -> None:
        """Connect; raises AgentError FAILED_PRECONDITION when nobody listens."""
        await self._stream.send(agent_pb2.PortForwardRequest(port=port))
        async for message in self._messages:
            if message.WhichOneof("message") != "connected":
                raise AgentLied("a connection began without saying that it is one")
            return
        raise AgentLied("a connection ended before it began")

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the port takes none."""
        for at in range(0, len(data), CHUNK_LIMIT):
            await self._stream.send(agent_pb2.PortForwardRequest(data=data[at : at + CHUNK_LIMIT]))

    async def close_write(self) -> None:
        """Say that no more bytes come."""
        await self._stream.send(agent_pb2.PortForwardRequest(closed=True))
        await self._stream.done()

    async def read(self) -> AsyncIterator[bytes]:
        """Iterate over what the port sends, to its end; raises AgentError ABORTED when the connection breaks."""
        async for message in self._messages:
            which = _kind(message)
            if which == "closed":
                return
            if which != "data":
                raise AgentLied("a connection that is one says so again")
            yield message.data


def _kind(message: Any, *, last: bool = False) -> str:
    """Return which of a stream's messages this is; raises AgentLied for none, and after the last one."""
    which: str | None = message.WhichOneof("message")
    if which is None or last:
        raise AgentLied("a message is of no kind" if which is None else "a message follows the last one")
    return which


def _size(size: TerminalSize) -> agent_pb2.TerminalSize:
    return agent_pb2.TerminalSize(columns=min(size.columns, TERMINAL_LIMIT), rows=min(size.rows, TERMINAL_LIMIT))
