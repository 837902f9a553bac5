"""Pods whose processes are small coroutines, and a server in front of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from vmruntime.agent.errors import AgentError
from vmruntime.aio.beside import beside
from vmruntime.errors import Code, FailedPrecondition
from vmruntime.model.streams import AttachSpec, ExecEnd, ExecSpec, OutputChunk, TerminalSize

AHEAD = 4


class FakeProcess:
    """Implements ExecStream and AttachStream; what it does is a coroutine that uses the lower half."""

    def __init__(self, spec: ExecSpec | AttachSpec) -> None:
        self.spec = spec
        self.end = ExecEnd(exit_code=0)
        self.too_slow = False
        self.sizes: list[TerminalSize] = []
        self.resized = asyncio.Event()
        self._input: asyncio.Queue[bytes] = asyncio.Queue(AHEAD)
        self._output: asyncio.Queue[OutputChunk | BaseException | None] = asyncio.Queue(AHEAD)

    async def output(self) -> AsyncIterator[OutputChunk]:
        yield OutputChunk(False, b"")
        while (item := await self._output.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    async def write(self, data: bytes) -> None:
        await self._input.put(data)

    async def close_input(self) -> None:
        await self._input.put(b"")

    async def resize(self, size: TerminalSize) -> None:
        self.sizes.append(size)
        self.resized.set()

    async def read(self) -> bytes:
        """As the process: return input; b"" at its end."""
        return await self._input.get()

    async def say(self, data: bytes, *, stderr: bool = False) -> None:
        """As the process: write."""
        await self._output.put(OutputChunk(stderr, data))

    async def exit(self, code: int = 0, error: str = "") -> None:
        """As the process: end."""
        self.end = ExecEnd(exit_code=code, error=error)
        await self._output.put(None)

    async def break_off(self, error: BaseException) -> None:
        """As the agent: fail."""
        await self._output.put(error)


Script = Callable[[FakeProcess], Awaitable[None]]


class FakePods:
    """The part of Pods that streams use. `script` is what exec and attach run; a port is a real one on loopback."""

    def __init__(self) -> None:
        self.script: Script = echo
        self.specs: list[ExecSpec | AttachSpec] = []
        self.killed = asyncio.Event()
        self.refuse: FailedPrecondition | None = None
        self.dialled: list[int] = []

    @contextlib.asynccontextmanager
    async def exec(self, spec: ExecSpec) -> AsyncIterator[FakeProcess]:
        async with self._run(spec) as process:
            yield process

    @contextlib.asynccontextmanager
    async def attach(self, spec: AttachSpec) -> AsyncIterator[FakeProcess]:
        async with self._run(spec) as process:
            yield process

    @contextlib.asynccontextmanager
    async def ports(self, sandbox_id: str) -> AsyncIterator[FakePods]:
        if self.refuse is not None:
            raise self.refuse
        yield self

    @contextlib.asynccontextmanager
    async def connect(self, port: int) -> AsyncIterator[FakePort]:
        self.dialled.append(port)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            raise AgentError(f"connect to port {port}: connection refused", Code.FAILED_PRECONDITION) from None
        try:
            yield FakePort(reader, writer)
        finally:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def _run(self, spec: ExecSpec | AttachSpec) -> AsyncIterator[FakeProcess]:
        self.specs.append(spec)
        if self.refuse is not None:
            raise self.refuse
        process = FakeProcess(spec)
        async with beside(self._live(process)):
            yield process

    async def _live(self, process: FakeProcess) -> None:
        try:
            await self.script(process)
        except asyncio.CancelledError:
            self.killed.set()
            raise


class FakePort:
    """Implements PortStream on a TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> AsyncIterator[bytes]:
        try:
            while data := await self._reader.read(65536):
                yield data
        except OSError:
            raise AgentError("connection reset by peer", Code.ABORTED) from None

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._writer.write(data)
            await self._writer.drain()

    async def close_write(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.write_eof()


async def echo(process: FakeProcess) -> None:
    """Do what cat does."""
    while data := await process.read():
        await process.say(data)
    await process.exit()


async def forever(process: FakeProcess) -> None:
    """Neither read nor write."""
    await asyncio.Event().wait()
