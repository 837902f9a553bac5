"""A console that grows while it is read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from vmruntime.agent.errors import AgentGone
from vmruntime.agent.interface import Agent
from vmruntime.aio.inotify import FileChanges
from vmruntime.clock import SystemClock
from vmruntime.model.output import OutputRecord
from vmruntime.pods.log_pump import LogPump
from vmruntime.sandboxes.image_vm import console_log, console_records
from vmruntime.sandboxes.image_vm.console_log import ConsoleOutput


@pytest.fixture
def changes() -> Iterator[FileChanges]:
    found = FileChanges()
    yield found
    found.close()


@pytest.fixture
def console(tmp_path: Path, changes: FileChanges) -> ConsoleOutput:
    return ConsoleOutput(tmp_path, changes, SystemClock())


def say(directory: Path, text: bytes) -> None:
    with (directory / "console.log").open("ab") as file:
        file.write(text)


def last_line(text: bytes) -> bytes:
    """The last whole line of a terminal's, as it is in a log file."""
    return b" " + text[: text.rindex(b"\r\n")].rpartition(b"\n")[2] + b"\n"


class Reading:
    """What a reader has got so far."""

    def __init__(self) -> None:
        self.got: list[OutputRecord] = []
        self.ended = False

    def texts(self) -> list[tuple[bytes, bool]]:
        return [(record.data, record.partial) for record in self.got]

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.got) < count:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def reading(console: ConsoleOutput, after: int = 0) -> AsyncIterator[Reading]:
    found = Reading()

    async def read() -> None:
        async with console.output(after) as reader:
            async for record in reader:
                found.got.append(record)
                await reader.acknowledge(record.seq)
        found.ended = True

    async with asyncio.TaskGroup() as group:
        task = group.create_task(read())
        yield found
        task.cancel()


async def test_lines_come_when_they_are_said(tmp_path: Path, console: ConsoleOutput) -> None:
    before = time.time_ns()
    async with reading(console) as reader:
        await asyncio.sleep(0.05)
        say(tmp_path, b"one\r\ntw")  # the file was not there yet
        await reader.until(1)
        began = time.monotonic()
        say(tmp_path, b"o\r\n")
        await reader.until(2)
        assert time.monotonic() - began < 0.9
    assert reader.texts() == [(b"one", False), (b"two", False)]
    assert [record.seq for record in reader.got] == [5, 10]
    assert before <= reader.got[0].time_ns <= reader.got[1].time_ns <= time.time_ns()


async def test_a_prompt_is_seen_after_a_moment(
    tmp_path: Path, console: ConsoleOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_log, "HOLD_SECONDS", 0.1)
    say(tmp_path, b"\r\nlogin: ")
    async with reading(console) as reader:
        await reader.until(2)
        assert reader.texts() == [(b"", False), (b"login: ", True)]
        say(tmp_path, b"root\r\n")
        await reader.until(3)
    assert reader.texts()[2] == (b"root", False)
    async with reading(console, reader.got[0].seq) as again:
        await again.until(2)
    assert again.got == reader.got[1:]


async def test_the_end(tmp_path: Path, console: ConsoleOutput, changes: FileChanges) -> None:
    say(tmp_path, b"one\nPower down")
    async with reading(console) as reader:
        await reader.until(1)
        assert await console.end() == 14
        await reader.until(2)
        await asyncio.sleep(0.05)
        assert reader.ended
    assert reader.texts() == [(b"one", False), (b"Power down", False)]
    say(tmp_path, b"BIOS\n")
    run = ConsoleOutput(tmp_path, changes, SystemClock(), start=14)
    async with reading(run) as second:
        await second.until(1)
    assert second.texts() == [(b"BIOS", False)]
    later = ConsoleOutput(tmp_path, changes, SystemClock())
    async with asyncio.timeout(5), later.output(0) as old:
        assert [record async for record in old] == reader.got
    await later.forget()
    assert not list(tmp_path.glob("console.log.0.seen"))


async def test_a_run_without_a_word(tmp_path: Path, changes: FileChanges) -> None:
    for _ in range(2):
        run = ConsoleOutput(tmp_path, changes, SystemClock())
        async with reading(run) as reader:
            await asyncio.sleep(0.02)
            assert await run.end() == 0
            async with asyncio.timeout(5):
                while not reader.ended:
                    await asyncio.sleep(0.01)
        assert reader.got == []


async def test_a_flood_that_nobody_reads_is_dropped(
    tmp_path: Path, console: ConsoleOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_log, "GUARD_SECONDS", 0.02)
    monkeypatch.setattr(console_records, "BACKLOG_LIMIT", 1024 * 1024)
    async with asyncio.TaskGroup() as group:
        guard = group.create_task(console.guard())
        for _ in range(8):
            say(tmp_path, b"0123456\n" * 65536)
            await asyncio.sleep(0.05)
        async with reading(console) as reader:
            await reader.until(2)
        assert reader.texts()[0][0].endswith(b"bytes of console output were dropped]")
        assert reader.texts()[1] == (b"0123456", False)
        assert (tmp_path / "console.log").stat().st_blocks * 512 < 2 * 1024 * 1024
        await console.end()
        say(tmp_path, b"more\n")
        async with asyncio.timeout(5):
            await guard


async def test_a_log_pump_makes_a_log_of_it(tmp_path: Path, console: ConsoleOutput, changes: FileChanges) -> None:
    class OnlyOutput:
        def output(self, container_id: str, after_seq: int) -> object:
            assert container_id == "c"
            return console.output(after_seq)

    run = tmp_path / "run"
    run.mkdir()
    console = ConsoleOutput(run, changes, SystemClock())
    path = tmp_path / "logs" / "0.log"
    lines = b"".join(b"line %d of a machine that says much\r\n" % number for number in range(40_000))
    for half in (lines[:700_000], lines[700_000:]):
        say(run, half)
        pump = LogPump(cast(Agent, OnlyOutput()), "c", str(path), tmp_path / "position")
        await pump.open()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(pump.run())
            async with asyncio.timeout(20):
                while not path.read_bytes().endswith(last_line(half)):
                    await asyncio.sleep(0.02)
            task.cancel()
    await console.end()
    pump = LogPump(cast(Agent, OnlyOutput()), "c", str(path), tmp_path / "position")
    await pump.open()
    await pump.run()
    said = [line.split(b" ", 3) for line in path.read_bytes().splitlines()]
    assert [words[3] for words in said] == lines.replace(b"\r", b"").splitlines()
    assert {words[2] for words in said} == {b"F"}
    assert (run / "console.log").stat().st_blocks * 512 < 512 * 1024


async def test_what_cannot_be_read_can_be_read_again(tmp_path: Path, console: ConsoleOutput) -> None:
    (tmp_path / "console.log").symlink_to("/etc/passwd")
    async with console.output(0) as reader:
        with pytest.raises(AgentGone, match="console's log"):
            await anext(aiter(reader))
    (tmp_path / "console.log").unlink()
    say(tmp_path, b"one\n")
    async with reading(console) as again:
        await again.until(1)


async def test_idle_consoles_cost_nothing(tmp_path: Path, changes: FileChanges) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(50):
            directory = tmp_path / str(number)
            directory.mkdir()
            say(directory, b"up\n")
            one = await stack.enter_async_context(reading(ConsoleOutput(directory, changes, SystemClock())))
            await one.until(1)
        await asyncio.sleep(0.2)
        began = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - began < 0.02
