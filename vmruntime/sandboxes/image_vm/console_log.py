"""A machine's serial console as a container's output."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import structlog

from vmruntime.agent.errors import AgentGone
from vmruntime.aio.inotify import FileChanges
from vmruntime.aio.pipeline import in_thread
from vmruntime.clock import Clock
from vmruntime.model.output import OutputRecord
from vmruntime.sandboxes.image_vm.console_records import ConsoleFile, Records

log = structlog.get_logger(__name__)

T = TypeVar("T")

HOLD_SECONDS = 1.0
"""After so long without a byte more, a line that has no end is given out: people wait to see "login: "."""

GATHER_SECONDS = 0.02
"""How long what a serial port says byte by byte is gathered."""

GUARD_SECONDS = 2.0


class ConsoleOutput:
    """What one run of a machine writes to its serial console, which its hypervisor appends to DIRECTORY/console.log.

    A record's number is the offset in the file right behind it. The time is when a daemon saw it.
    """

    def __init__(self, directory: Path, changes: FileChanges, clock: Clock, *, start: int = 0) -> None:
        """Describe a run.

        Args:
            directory: The machine's runtime directory.
            changes: Tells when the file grows.
            clock: Gives records their time.
            start: The file's size before the run: what end() of the run before returned.
        """
        self._path = directory / "console.log"
        self._changes = changes
        self._clock = clock
        self._start = start
        self._file: ConsoleFile | None = None
        self._turn = asyncio.Lock()
        self._news: set[asyncio.Event] = set()

    @contextlib.asynccontextmanager
    async def output(self, after_seq: int) -> AsyncIterator[ConsoleReader]:
        """Read the records after `after_seq`; one reader at a time. It raises AgentGone when the file cannot be read."""
        news = asyncio.Event()
        records = await self.use(lambda file: Records(file, after_seq))
        self._news.add(news)
        try:
            yield ConsoleReader(self, records, news)
        finally:
            self._news.discard(news)

    async def end(self) -> int:
        """Say that the machine has ended: readers come to their end. Return where the next run's output begins.

        To be called before the machine starts again. A later call, also in a later daemon, returns the same.

        Raises:
            AgentGone: It cannot be noted.
        """
        size = await self.use(lambda file: file.end())
        self._tell()
        return size

    async def guard(self) -> None:
        """Keep a machine from filling the disk when nobody reads: run this in the background, until the machine's end.

        Of more than 64 MiB that wait the older half is dropped, and a record says so.
        """
        while True:
            grown = asyncio.Event()
            self._changes.arm(self._path, grown.set)
            try:
                ended, dropped = await self.use(lambda file: (file.ended, file.bound()))
            except AgentGone as error:
                log.warning("console output is not bounded", error=str(error))
                ended = dropped = False
            if ended:
                return
            if dropped:
                log.warning("console output was dropped, since nobody reads it", path=str(self._path))
                self._tell()
            await grown.wait()
            await asyncio.sleep(GUARD_SECONDS)

    async def forget(self) -> None:
        """Remove what was noted about the run; its output cannot be read exactly once any more."""
        await self.use(lambda file: file.journal.remove())

    async def use(self, function: Callable[[ConsoleFile], T]) -> T:
        """Run a blocking function on the file, one at a time; raise AgentGone when the disk does not do its part."""

        def run() -> T:
            if self._file is None:
                self._file = ConsoleFile(self._path, self._start, self._clock)
            return function(self._file)

        async with self._turn:
            try:
                return await in_thread(run)
            except OSError as error:
                raise AgentGone(f"the console's log {self._path}: {error.strerror or error}") from error

    def watch(self, news: asyncio.Event) -> None:
        """Set an event at the file's next growth."""
        self._changes.arm(self._path, news.set)

    def _tell(self) -> None:
        for news in self._news:
            news.set()


class ConsoleReader:
    """Implements agent.interface.OutputReader."""

    def __init__(self, console: ConsoleOutput, records: Records, news: asyncio.Event) -> None:
        self._console = console
        self._records = records
        self._news = news

    async def __aiter__(self) -> AsyncIterator[OutputRecord]:
        """Iterate to the machine's end."""
        watched = False
        while True:
            if not watched and self._records.drained:
                # Before the look that finds nothing, so that nothing is missed.
                self._news.clear()
                self._console.watch(self._news)
                watched = True
            records = await self._console.use(lambda _: self._records.step())
            for record in records:
                yield record
            if self._records.ended:
                return
            if records or not self._records.drained:
                watched = False
            elif watched:
                await self._rest()
                watched = False

    async def acknowledge(self, seq: int) -> None:
        """Give back the disk of what is safe; now and then."""
        if self._records.file.worth_freeing(seq):
            await self._console.use(lambda file: file.free(seq))

    async def _rest(self) -> None:
        """Wait until there is something to do."""
        try:
            async with asyncio.timeout(HOLD_SECONDS if self._records.holds_text else None):
                await self._news.wait()
        except TimeoutError:
            await self._console.use(lambda _: self._records.cut())
        else:
            await asyncio.sleep(GATHER_SECONDS)
