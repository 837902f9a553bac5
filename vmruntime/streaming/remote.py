"""Joins a client's streams to a process's, whatever the client speaks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import structlog

from vmruntime.agent.interface import AttachStream, ExecStream, ProcessStream
from vmruntime.aio.beside import beside
from vmruntime.errors import VmruntimeError
from vmruntime.model.streams import AttachSpec, ExecEnd, ExecSpec, OutputChunk, TerminalSize
from vmruntime.streaming.errors import ClientGone

log = structlog.get_logger(__name__)


class RemoteStreams(Protocol):
    """The client's end of exec and attach."""

    async def greet(self) -> None:
        """Say that the process runs, or is joined, now."""

    async def read_input(self) -> bytes:
        """Return input; b"" at its end."""

    async def read_size(self) -> TerminalSize | None:
        """Return the terminal's next size; None when no more come."""

    async def write(self, chunk: OutputChunk) -> None:
        """Send output, waiting while the client takes none; what the client did not ask for is dropped."""

    async def wait_gone(self) -> None:
        """Wait until the client's connection has ended."""

    async def finish(self, outcome: Outcome) -> None:
        """Say how it ended, after all the output, and end the conversation."""


class Outcome:
    """How a session ended."""

    def __init__(self, end: ExecEnd | None = None, failure: str = "") -> None:
        """Note it.

        Args:
            end: How the command ended; None for attach.
            failure: Why there is no end; empty when there is.
        """
        self.end = end
        self.failure = failure


async def run_exec(
    remote: RemoteStreams, spec: ExecSpec, open_stream: Callable[[ExecSpec], AbstractAsyncContextManager[ExecStream]]
) -> None:
    """Run a command for a client. When the client goes, the command is killed.

    Clients show the exit code alone, so why a command could not be run is said in its output, as a shell says it.

    Raises:
        ClientGone: The client went away before the end.
    """
    try:
        async with open_stream(spec) as stream:
            await _join(remote, stream)
            outcome = Outcome(stream.end)
            if stream.end.error:
                await remote.write(OutputChunk(not spec.tty, f"{stream.end.error}\n".encode()))
    except VmruntimeError as error:
        log.info("exec failed", error=str(error))
        outcome = Outcome(failure=f"error executing command in container: {error}")
    await remote.finish(outcome)


async def run_attach(
    remote: RemoteStreams,
    spec: AttachSpec,
    open_stream: Callable[[AttachSpec], AbstractAsyncContextManager[AttachStream]],
) -> None:
    """Show a client what a container writes and pass its input on. When the client goes, the container goes on.

    Raises:
        ClientGone: The client went away before the end.
    """
    try:
        async with open_stream(spec) as stream:
            await _join(remote, stream)
            slow = "the client did not take the output, which held up the container"
            outcome = Outcome(failure=slow if stream.too_slow else "")
    except VmruntimeError as error:
        log.info("attach failed", error=str(error))
        outcome = Outcome(failure=f"error attaching to container: {error}")
    await remote.finish(outcome)


async def _join(remote: RemoteStreams, stream: ProcessStream) -> None:
    """Pass everything on until the process's output is at its end."""
    async with beside(_input(remote, stream), _sizes(remote, stream), _until_gone(remote)):
        async for chunk in stream.output():
            await (remote.write(chunk) if chunk.data else remote.greet())


async def _input(remote: RemoteStreams, stream: ProcessStream) -> None:
    while data := await remote.read_input():
        await stream.write(data)
    await stream.close_input()


async def _sizes(remote: RemoteStreams, stream: ProcessStream) -> None:
    while size := await remote.read_size():
        await stream.resize(size)


async def _until_gone(remote: RemoteStreams) -> None:
    await remote.wait_gone()
    raise ClientGone("the client has gone")
