"""Brings one container's output from its agent into its CRI log file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.interface import Agent, OutputReader
from vmruntime.aio.beside import together
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import ResourceExhausted
from vmruntime.logs.writer import LogWriter
from vmruntime.model.output import OutputRecord

log = structlog.get_logger(__name__)

BATCH_RECORDS = 256
RETRY_SECONDS = 0.2
DISK_FULL_SECONDS = 5.0


class LogPump:
    """Reads records, writes lines, acknowledges; goes on after a broken connection until the output's end."""

    def __init__(self, agent: Agent, container_id: str, log_path: str, position: Path) -> None:
        self._agent = agent
        self._container_id = container_id
        self._writer = LogWriter(Path(log_path) if log_path else None, position)
        self._file = asyncio.Lock()
        self._drained = asyncio.Event()
        self._closed = False

    async def open(self) -> None:
        """Open the log file; raise FailedPrecondition when its path cannot be used."""
        await in_thread(self._writer.open)

    async def run(self) -> None:
        """Pump until the container's output has ended or the sandbox is gone."""
        try:
            ended = False
            while not ended:
                ended = await self._pump()
                if not ended:
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            await self.close()
            # After the close: who waits for this may remove the note of the position.
            self._drained.set()

    async def close(self) -> None:
        """Close the file; for a pump that is not going to run."""
        async with self._file:
            self._closed = True
            self._writer.close()

    async def reopen(self) -> None:
        """Close the file and open its path again, between two batches."""
        async with self._file:
            await in_thread(self._writer.reopen)
            if self._closed:  # a container may close its output and go on
                self._writer.close()

    async def wait_drained(self, timeout: float) -> None:
        """Wait until everything the container wrote is in its log, at most so many seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._drained.wait()
        except TimeoutError:
            log.warning("output is still open after the container ended", container=self._container_id)

    async def _pump(self) -> bool:
        """Read one connection's worth; True when there is no more to come."""
        try:
            async with self._agent.output(self._container_id, self._writer.seq) as reader:
                await self._copy(reader)
        except AgentGone as error:
            log.debug("output interrupted", container=self._container_id, error=str(error))
            return False
        except AgentError as error:
            log.warning("output ended early", container=self._container_id, error=str(error))
            return True
        return True

    async def _copy(self, reader: OutputReader) -> None:
        """Write what has arrived in one go, and only then wait for more: a batch costs one write and one note."""
        queue: asyncio.Queue[OutputRecord | None] = asyncio.Queue(BATCH_RECORDS)

        async def fill() -> None:
            async for record in reader:
                await queue.put(record)
            await queue.put(None)

        async def drain() -> None:
            ended = False
            while not ended:
                batch = [await queue.get()]
                while not queue.empty():
                    batch.append(queue.get_nowait())
                records = [record for record in batch if record is not None]
                ended = len(records) < len(batch)
                await self._write(records)
                if records:
                    await reader.acknowledge(records[-1].seq)

        await together(fill(), drain())

    async def _write(self, records: list[OutputRecord]) -> None:
        """Write a batch; while the disk is full, wait: the container stops when its buffer in the guest is full."""
        while True:
            try:
                async with self._file:
                    await in_thread(lambda: self._writer.write(records))
            except ResourceExhausted as error:
                log.error("log not written, trying again", container=self._container_id, error=str(error))
                await asyncio.sleep(DISK_FULL_SECONDS)
            else:
                return
