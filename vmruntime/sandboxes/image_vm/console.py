"""A machine's serial console for people: everybody who has joined it shares the hypervisor's one connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from vmruntime.agent.errors import AgentError
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import Code
from vmruntime.model.streams import AttachSpec, OutputChunk, TerminalSize

CHUNK = 64 * 1024
CHUNKS_AHEAD = 16

STUCK_SECONDS = 10.0
"""How long somebody who takes no output may hold up the others, and the machine (ADR 0003)."""


class Console:
    """The way to a machine's console; DIRECTORY/console.sock serves one client at a time, which is this object.

    It is connected while somebody has joined, so that between two sessions another program may be.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "console.sock"
        self._turn = asyncio.Lock()
        self._line: _Line | None = None

    @contextlib.asynccontextmanager
    async def attach(self, spec: AttachSpec) -> AsyncIterator[ConsoleAttach]:
        """Join the console from now on; its output is at its end when the machine is.

        Raises:
            AgentError: FAILED_PRECONDITION: the machine does not run.
        """
        async with self._turn:
            line = self._line
            if line is None or line.ended:
                line = self._line = await _Line.connect(self._path)
            one = ConsoleAttach(spec, line)
            line.attached.append(one)
        try:
            yield one
        finally:
            async with self._turn:
                line.attached.remove(one)
                if not line.attached:
                    await line.close()
                    if self._line is line:
                        self._line = None


class ConsoleAttach:
    """Somebody who has joined; implements agent.interface.AttachStream."""

    def __init__(self, spec: AttachSpec, line: _Line) -> None:
        self._spec = spec
        self._line = line
        self._chunks: deque[bytes] = deque()
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._ended = False
        self.too_slow = False

    async def output(self) -> AsyncIterator[OutputChunk]:
        """Iterate over what the console shows from now on."""
        yield OutputChunk(False, b"")
        while True:
            if self._chunks:
                data = self._chunks.popleft()
                self._room.set()
                yield OutputChunk(False, data)
            elif self._ended or self._line.ended:
                return
            else:
                self._more.clear()
                await self._more.wait()

    async def write(self, data: bytes) -> None:
        """Type; waits while the machine takes none."""
        if self._spec.stdin and data:
            await self._line.write(data)

    async def close_input(self) -> None:
        """Do nothing: a terminal goes on when somebody has left it."""

    async def resize(self, size: TerminalSize) -> None:
        """Do nothing: a serial line knows no size."""

    async def take(self, data: bytes, deadline: float) -> None:
        """Be given output; who has no room for it by the deadline is let go."""
        if not self._spec.stdout or self._ended:
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._room.wait()
        except TimeoutError:
            self.too_slow = True
            self._ended = True
        else:
            self._chunks.append(data)
            if len(self._chunks) >= CHUNKS_AHEAD:
                self._room.clear()
        self.wake()

    def wake(self) -> None:
        """Look for output, or the end of it."""
        self._more.set()


class _Line:
    """One connection.

    Attributes:
        attached: Who gets the output.
        ended: The machine has hung up.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._typing = asyncio.Lock()
        self.attached: list[ConsoleAttach] = []
        self.ended = False
        self._scope = TaskScope("console")
        self._scope.start(self._fan_out(), "output")

    @classmethod
    async def connect(cls, path: Path) -> _Line:
        try:
            return cls(*await asyncio.open_unix_connection(str(path)))
        except OSError as error:
            raise AgentError(
                f"the pod's machine does not run, so that there is no console to join ({error.strerror or error})",
                Code.FAILED_PRECONDITION,
            ) from error

    async def write(self, data: bytes) -> None:
        async with self._typing:
            if self.ended:
                return
            with contextlib.suppress(OSError):
                self._writer.write(data)
                await self._writer.drain()

    async def close(self) -> None:
        await self._scope.close()
        self._hang_up()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _fan_out(self) -> None:
        try:
            while data := await self._reader.read(CHUNK):
                deadline = asyncio.get_running_loop().time() + STUCK_SECONDS
                for one in list(self.attached):
                    await one.take(data, deadline)
        except OSError:
            pass  # why the machine has gone is told by who waits for it
        finally:
            self._hang_up()

    def _hang_up(self) -> None:
        self.ended = True
        # What was typed and not taken is of no use to anybody: not flushed.
        self._writer.transport.abort()
        for one in self.attached:
            one.wake()
