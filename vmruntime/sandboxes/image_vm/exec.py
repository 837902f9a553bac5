"""Commands in a machine, run by its QEMU guest agent: as root, without a terminal, with their output at the end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import ExecOutput
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import Code, DeadlineExceeded
from vmruntime.model.streams import ExecEnd, ExecSpec, OutputChunk, TerminalSize
from vmruntime.qga.answers import OUTPUT_LIMIT
from vmruntime.qga.client import INPUT_LIMIT, GuestAgent
from vmruntime.qga.errors import QgaNotStarted
from vmruntime.sandboxes.image_vm.guest_link import GuestLink, told_as_agent_errors

CHUNK = 64 * 1024

NO_TERMINAL = (
    "the QEMU guest agent in the pod's machine has no terminals (leave out -t; for a terminal: vmruntime ssh POD, or the"
    " serial console by kubectl attach or vmruntime console POD)"
)


class GuestCommands:
    """Runs commands over a link. Each polls for its own end, so that a long one holds up nobody."""

    def __init__(self, link: GuestLink) -> None:
        self._link = link

    async def exec_sync(self, argv: list[str], timeout: float, limit: int) -> ExecOutput:
        """Run a command to its end; see agent.interface.Agent."""
        with told_as_agent_errors():
            return await _run(await self._link.agent(), argv, b"", timeout, limit)

    @contextlib.asynccontextmanager
    async def exec(self, spec: ExecSpec) -> AsyncIterator[GuestExec]:
        """Run a command; leaving the block before its end kills it, though not what it has started.

        Raises:
            AgentError: A terminal is asked for.
        """
        if spec.tty:
            raise AgentError(NO_TERMINAL, Code.UNIMPLEMENTED)
        scope = TaskScope("exec in a guest")
        try:
            stream = GuestExec(spec, self._link.agent)
            scope.start(stream.run(), "command")
            yield stream
        finally:
            await scope.close()


class GuestExec:
    """A command; implements agent.interface.ExecStream.

    Input is collected until it is closed: the guest agent takes it with the command, all at once.
    """

    def __init__(self, spec: ExecSpec, agent: Callable[[], Awaitable[GuestAgent]]) -> None:
        self._spec = spec
        self._agent = agent
        self._input = bytearray()
        self._given = asyncio.Event()
        self._reached = asyncio.Event()
        self._over = asyncio.Event()
        self._outcome: ExecOutput | AgentError | None = None
        if not spec.stdin:
            self._given.set()

    @property
    def end(self) -> ExecEnd:
        """How it ended; known when output() is at its end."""
        if not isinstance(self._outcome, ExecOutput):
            raise AgentError("the command's output was not read to its end", Code.FAILED_PRECONDITION)
        return self._outcome.end

    async def write(self, data: bytes) -> None:
        """Collect input; beyond 4 MiB the command does not start."""
        if self._given.is_set():
            return
        self._input += data
        if len(self._input) > INPUT_LIMIT:
            self._given.set()

    async def close_input(self) -> None:
        """End the input: the command starts."""
        self._given.set()

    async def resize(self, size: TerminalSize) -> None:
        """Do nothing: there is no terminal."""

    async def output(self) -> AsyncIterator[OutputChunk]:
        """Wait for the end, then give all that it wrote."""
        await self._reached.wait()
        if self._outcome is None:
            yield OutputChunk(False, b"")
        await self._over.wait()
        if isinstance(self._outcome, AgentError):
            raise self._outcome
        if self._outcome is None:
            raise AgentError("the command was given up", Code.ABORTED)
        for stderr, wanted, data in (
            (False, self._spec.stdout, self._outcome.stdout),
            (True, self._spec.stderr, self._outcome.stderr),
        ):
            for at in range(0, len(data) if wanted else 0, CHUNK):
                yield OutputChunk(stderr, data[at : at + CHUNK])

    async def run(self) -> None:
        """Do it; output() tells what came of it."""
        try:
            with told_as_agent_errors():
                agent = await self._agent()
                self._reached.set()
                await self._given.wait()
                self._outcome = await _run(agent, self._spec.argv, bytes(self._input), self._spec.timeout, OUTPUT_LIMIT)
        except AgentError as error:
            self._outcome = error
        finally:
            self._input.clear()
            self._reached.set()
            self._over.set()


async def _run(agent: GuestAgent, argv: list[str], stdin: bytes, timeout: float, limit: int) -> ExecOutput:
    try:
        result = await agent.run(argv, timeout=timeout or None, stdin=stdin, output_limit=limit)
    except QgaNotStarted as error:
        why = "executable file not found in $PATH" if error.missing else error.message
        end = ExecEnd(exit_code=127 if error.missing else 126, error=f'exec: "{argv[0]}": {why}')
    except DeadlineExceeded:
        end = ExecEnd(exit_code=128 + signal.SIGKILL, timed_out=True)
    else:
        return ExecOutput(stdout=result.stdout, stderr=result.stderr, end=ExecEnd(exit_code=result.exit_code))
    return ExecOutput(stdout=b"", stderr=b"", end=end)
