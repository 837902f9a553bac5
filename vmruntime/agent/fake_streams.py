"""Streams of a fake guest: commands, attached containers, ports that echo."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from vmruntime.agent.errors import AgentError
from vmruntime.agent.fake_container import SIGKILL, FakeContainer
from vmruntime.agent.fake_programs import Process, Program
from vmruntime.model.streams import AttachSpec, ExecEnd, ExecSpec, OutputChunk, TerminalSize

CHUNKS_AHEAD = 16


class Chunks:
    """Output on its way to one reader; the writer waits while the reader is behind."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[OutputChunk | None] = asyncio.Queue(CHUNKS_AHEAD)
        self._ended = False

    async def write(self, data: bytes, *, stderr: bool) -> None:
        """Take output."""
        if not self._ended:
            await self._queue.put(OutputChunk(stderr, data))

    async def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        await self._queue.put(None)

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        while (chunk := await self._queue.get()) is not None:
            yield chunk


class Exec:
    """A command; implements agent.interface.ExecStream. It runs while its output is read.

    Attributes:
        sizes: What the terminal was resized to.
    """

    def __init__(self, spec: ExecSpec, find: Callable[[], tuple[FakeContainer, Program | ExecEnd]]) -> None:
        self._spec = spec
        self._find = find
        self._end: ExecEnd | None = None
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self.sizes: list[TerminalSize] = []
        if not spec.stdin:
            self._input.put_nowait(b"")

    @property
    def end(self) -> ExecEnd:
        """How it ended."""
        if self._end is None:
            raise AssertionError("the output was not read to its end")
        return self._end

    async def write(self, data: bytes) -> None:
        """Send input."""
        if data:
            await self._input.put(data)

    async def close_input(self) -> None:
        """End the input."""
        await self._input.put(b"")

    async def resize(self, size: TerminalSize) -> None:
        """Note the size."""
        self.sizes.append(size)

    async def output(self) -> AsyncIterator[OutputChunk]:
        """Run the command; what it writes is iterated over."""
        container, program = self._find()
        if isinstance(program, ExecEnd):
            self._end = program
            return
        chunks = Chunks()
        process = Process(
            argv=self._spec.argv,
            sink=chunks,
            uid=container.process.uid,
            hostname=container.process.hostname,
            stdin=self._input,
        )
        running = asyncio.ensure_future(self._run(program, process, container, chunks))
        try:
            async for chunk in chunks:
                yield chunk
            self._end = await running
        finally:
            running.cancel()
            await asyncio.wait({running})

    async def _run(self, program: Program, process: Process, container: FakeContainer, chunks: Chunks) -> ExecEnd:
        """Return how the command ended: by itself, at its time-out, or with its container."""
        ended = asyncio.ensure_future(container.wait_ended())
        work = asyncio.ensure_future(program(process))
        try:
            done, _ = await asyncio.wait(
                {ended, work}, timeout=self._spec.timeout or None, return_when=asyncio.FIRST_COMPLETED
            )
            code = work.result() if work in done else 128 + SIGKILL
            return ExecEnd(exit_code=code, timed_out=not done)
        finally:
            for task in (ended, work):
                task.cancel()
            await asyncio.wait({ended, work})
            await chunks.end()


class Attach:
    """A container somebody has joined; implements agent.interface.AttachStream."""

    def __init__(self, spec: AttachSpec, find: Callable[[], FakeContainer]) -> None:
        self._spec = spec
        self._find = find
        self.too_slow = False

    async def write(self, data: bytes) -> None:
        """Send input to the container, if it was created with one."""
        if self._spec.stdin and data:
            await self._find().process.stdin.put(data)

    async def close_input(self) -> None:
        """End the container's input, if it was created for one session of it."""
        container = self._find()
        if container.request.stdin_once:
            await container.process.stdin.put(b"")

    async def resize(self, size: TerminalSize) -> None:
        """Note the size."""
        self._find().sizes.append(size)

    async def output(self) -> AsyncIterator[OutputChunk]:
        """Iterate over what the container writes from now on."""
        container = self._find()
        chunks = Chunks()
        container.joined.append(chunks)
        try:
            yield OutputChunk(False, b"")
            async for chunk in chunks:
                if self._spec.stderr if chunk.stderr else self._spec.stdout:
                    yield chunk
        finally:
            container.joined.remove(chunks)


class Echo:
    """A connection to a port that sends back what it gets; implements agent.interface.PortStream."""

    def __init__(self) -> None:
        self._data: asyncio.Queue[bytes] = asyncio.Queue(CHUNKS_AHEAD)

    async def read(self) -> AsyncIterator[bytes]:
        """Iterate over what comes back."""
        while data := await self._data.get():
            yield data

    async def write(self, data: bytes) -> None:
        """Send bytes."""
        if data:
            await self._data.put(data)

    async def close_write(self) -> None:
        """Say that no more bytes come."""
        await self._data.put(b"")


async def collect(command: Exec, limit: int) -> tuple[bytes, bytes, ExecEnd]:
    """Run a command to its end; keep `limit` bytes of each output."""
    kept = {False: bytearray(), True: bytearray()}
    async for chunk in command.output():
        output = kept[chunk.stderr]
        output += chunk.data[: max(0, limit - len(output))]
    return bytes(kept[False]), bytes(kept[True]), command.end


def missing(error: AgentError) -> ExecEnd:
    """Return the end of a command that is not there."""
    return ExecEnd(exit_code=127, error=error.message)
