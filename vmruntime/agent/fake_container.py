"""A container of a fake guest: its process, its output, its end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from vmruntime.agent.errors import AgentError
from vmruntime.agent.fake_programs import Process, Program
from vmruntime.agent.interface import RECORD_LIMIT, GuestContainer, GuestContainerState, GuestPhase
from vmruntime.errors import Code
from vmruntime.model.output import OutputRecord
from vmruntime.model.streams import TerminalSize

OUTPUT_LIMIT = 1024 * 1024
RECORD_OVERHEAD = 64
SIGKILL = 9
FIRST_PID = 100


class News:
    """Wakes everybody who waits."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        """Wait for the next tell()."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def tell(self) -> None:
        """Wake them."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class OutputBuffer:
    """Output until it is acknowledged; the writer waits while it is full, and only the newest reader is served."""

    def __init__(self, now_ns: Callable[[], int], limit: int = OUTPUT_LIMIT) -> None:
        self._now_ns = now_ns
        self._limit = limit
        self._records: deque[OutputRecord] = deque()
        self._bytes = 0
        self._last = 0
        self._lines = {False: b"", True: b""}
        self._ended = False
        self._reader = 0
        self._news = News()

    async def write(self, data: bytes, *, stderr: bool) -> None:
        """Take output, cut into records."""
        *lines, rest = (self._lines[stderr] + data).split(b"\n")
        for line in lines:
            await self._push_line(line, stderr=stderr)
        while len(rest) > RECORD_LIMIT:
            await self._push(rest[:RECORD_LIMIT], stderr=stderr, partial=True)
            rest = rest[RECORD_LIMIT:]
        self._lines[stderr] = rest

    async def end(self) -> None:
        """Nothing more will come: a line without its newline is told as a whole one."""
        for stderr, rest in self._lines.items():
            if rest:
                self._lines[stderr] = b""
                await self._push(rest, stderr=stderr, partial=False)
        self.close()

    def close(self) -> None:
        """End at once, whatever is unsaid."""
        self._ended = True
        self._news.tell()

    def acknowledge(self, seq: int) -> None:
        """Forget everything up to `seq`."""
        if seq > self._last:
            # The wire's OUT_OF_RANGE, as agent.client.translate tells it.
            raise AgentError(f"OUT_OF_RANGE: record {seq} does not exist: the last one is {self._last}", Code.INTERNAL)
        while self._records and self._records[0].seq <= seq:
            self._bytes -= _cost(self._records.popleft().data)
        self._news.tell()

    async def read(self, after_seq: int) -> AsyncIterator[OutputRecord]:
        """Iterate over what follows, to the end; a newer reader takes over."""
        self._reader += 1
        ticket = self._reader
        self._news.tell()
        sent = after_seq
        while True:
            if ticket != self._reader:
                raise AgentError("another reader has taken over", Code.ABORTED)
            record = next((one for one in self._records if one.seq > sent), None)
            if record is not None:
                sent = record.seq
                yield record
            elif self._ended:
                return
            else:
                await self._news.wait()

    async def _push_line(self, line: bytes, *, stderr: bool) -> None:
        while len(line) > RECORD_LIMIT:
            await self._push(line[:RECORD_LIMIT], stderr=stderr, partial=True)
            line = line[RECORD_LIMIT:]
        await self._push(line, stderr=stderr, partial=False)

    async def _push(self, data: bytes, *, stderr: bool, partial: bool) -> None:
        while self._records and self._bytes + _cost(data) > self._limit and not self._ended:
            await self._news.wait()
        self._last += 1
        self._bytes += _cost(data)
        self._records.append(OutputRecord(self._last, stderr, self._now_ns(), partial, data))
        self._news.tell()


class Joined(Protocol):
    """Somebody who has joined a container's output."""

    async def write(self, data: bytes, *, stderr: bool) -> None:
        """Take what the container writes."""

    async def end(self) -> None:
        """Nothing more comes."""


class FakeContainer:
    """One container. `publish` is told of each change of its state.

    Attributes:
        joined: Who has attached to it.
        sizes: What its terminal was resized to.
        resources: What UpdateContainer set, in order.
    """

    def __init__(
        self,
        request: GuestContainer,
        program: Program,
        process: Process,
        number: int,
        now_ns: Callable[[], int],
        publish: Callable[[GuestContainerState], None],
    ) -> None:
        self.request = request
        self.output = OutputBuffer(now_ns)
        self.process = process
        self.phase = GuestPhase.CREATED
        self.joined: list[Joined] = []
        self.sizes: list[TerminalSize] = []
        self.resources: list[bytes] = []
        self._program = program
        self._pid = FIRST_PID + number
        self._now_ns = now_ns
        self._publish = publish
        self._started_at = self._exited_at = self._exit_code = 0
        self._oom_killed = False
        self._ended = asyncio.Event()
        process.sink = self
        if not request.stdin:
            process.stdin.put_nowait(b"")

    @property
    def state(self) -> GuestContainerState:
        """What the agent says of it."""
        return GuestContainerState(
            id=self.request.id,
            phase=self.phase,
            pid=self._pid,
            started_at=self._started_at,
            exited_at=self._exited_at,
            exit_code=self._exit_code,
            oom_killed=self._oom_killed,
        )

    def start(self, run: Callable[[Awaitable[None]], None]) -> int:
        """Start the program in a task that `run` owns; return when."""
        self.phase = GuestPhase.RUNNING
        self._started_at = self._now_ns()
        self._publish(self.state)
        run(self._run())
        return self._started_at

    def signal(self, signal: int) -> None:
        """Signal the first process: as in a PID namespace of its own, only SIGKILL ends one that has no handler."""
        if signal == SIGKILL:
            self.exit(128 + SIGKILL)
        elif signal in self.process.handlers:
            self.exit(self.process.handlers[signal])

    def exit(self, code: int, *, oom_killed: bool = False) -> None:
        """End now."""
        if self.phase is GuestPhase.EXITED:
            return
        self.phase = GuestPhase.EXITED
        self._exited_at = self._now_ns()
        self._exit_code = code
        self._oom_killed = oom_killed
        self._ended.set()
        self._publish(self.state)
        if self._started_at == 0:
            self.output.close()

    async def write(self, data: bytes, *, stderr: bool) -> None:
        """Take what the program writes, for the log and for those who have joined."""
        for reader in list(self.joined):
            await reader.write(data, stderr=stderr)
        await self.output.write(data, stderr=stderr)

    async def wait_ended(self) -> None:
        """Wait for the end."""
        await self._ended.wait()

    async def _run(self) -> None:
        program = asyncio.ensure_future(self._program(self.process))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({program, ended}, return_when=asyncio.FIRST_COMPLETED)
            if program.done():
                self.exit(program.result())
        finally:
            for task in (program, ended):
                task.cancel()
            await asyncio.wait({program, ended})
        await self.output.end()
        for reader in list(self.joined):
            await reader.end()


def _cost(data: bytes) -> int:
    return len(data) + RECORD_OVERHEAD
