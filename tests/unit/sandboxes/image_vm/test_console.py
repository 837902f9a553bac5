"""Joining a machine's console."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmruntime.agent.errors import AgentError
from vmruntime.errors import Code
from vmruntime.model.streams import AttachSpec, TerminalSize
from vmruntime.sandboxes.image_vm import console as console_module
from vmruntime.sandboxes.image_vm.console import Console, ConsoleAttach

ALL = AttachSpec(container_id="c", tty=True, stdin=True)


class Chardev:
    """QEMU's end of a console: one client at a time, others wait.

    Attributes:
        typed: What clients wrote.
        clients: How many there have been.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self._turn = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self.joined = asyncio.Event()
        self.typed = b""
        self.clients = 0
        self.listening = asyncio.Event()
        self.listening.set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))

    async def say(self, text: bytes) -> None:
        await asyncio.wait_for(self.joined.wait(), 5)
        assert self._writer is not None
        self._writer.write(text)
        await self._writer.drain()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        if self._writer is not None:
            self._writer.close()
        await self._server.wait_closed()
        self._path.unlink(missing_ok=True)

    async def until_typed(self, text: bytes) -> None:
        async with asyncio.timeout(5):
            while text not in self.typed:
                await asyncio.sleep(0.005)

    async def until_left(self) -> None:
        async with asyncio.timeout(5):
            while self.joined.is_set():
                await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._turn:
            self._writer = writer
            self.clients += 1
            self.joined.set()
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(1000):
                    self.typed += data
                    await self.listening.wait()
            self.joined.clear()
            writer.close()


@pytest.fixture
async def chardev(tmp_path: Path) -> AsyncIterator[Chardev]:
    found = Chardev(tmp_path / "console.sock")
    await found.start()
    yield found
    await found.stop()


async def shown(one: ConsoleAttach, count: int) -> bytes:
    """Read until so many bytes have come; fewer: that was the end."""
    text = b""
    async with asyncio.timeout(10):
        async for chunk in one.output():
            assert not chunk.stderr
            text += chunk.data
            if len(text) >= count:
                break
    return text


async def type_for_ever(one: ConsoleAttach) -> None:
    while True:
        await one.write(b"y" * 65536)


async def test_everybody_sees_it_and_may_type(tmp_path: Path, chardev: Chardev) -> None:
    console = Console(tmp_path)
    async with console.attach(ALL) as first, console.attach(ALL) as second:
        await chardev.say(b"login: ")
        assert await shown(first, 7) == await shown(second, 7) == b"login: "
        await first.write(b"ro")
        await second.write(b"ot\n")
        await second.close_input()
        await second.resize(TerminalSize(columns=80, rows=24))
        await chardev.until_typed(b"root\n")
        assert chardev.clients == 1
    await chardev.until_left()
    async with console.attach(ALL) as third:
        await chardev.say(b"again")
        assert await shown(third, 5) == b"again"
    assert chardev.clients == 2


async def test_what_was_not_asked_for_does_not_flow(tmp_path: Path, chardev: Chardev) -> None:
    console = Console(tmp_path)
    mute = AttachSpec(container_id="c", stdin=False)
    blind = AttachSpec(container_id="c", stdin=True, stdout=False)
    async with console.attach(mute) as first, console.attach(blind) as second:
        await first.write(b"no")
        await second.write(b"yes")
        await chardev.until_typed(b"yes")
        await chardev.say(b"text")
        assert await shown(first, 4) == b"text"
        await chardev.stop()
        assert await shown(second, 1) == b""
    assert chardev.typed == b"yes"


async def test_the_machine_ends_and_starts_again(tmp_path: Path, chardev: Chardev) -> None:
    console = Console(tmp_path)
    async with console.attach(ALL) as first:
        await chardev.say(b"Power down\r\n")
        await chardev.stop()
        assert await shown(first, 1000) == b"Power down\r\n"
        assert not first.too_slow
        await first.write(b"nobody reads this")
        with pytest.raises(AgentError, match="does not run") as caught:
            async with console.attach(ALL):
                pass
        assert caught.value.code is Code.FAILED_PRECONDITION
        await chardev.start()
        async with console.attach(ALL) as second:
            await chardev.say(b"BIOS")
            assert await shown(second, 4) == b"BIOS"


async def test_who_takes_nothing_is_let_go(tmp_path: Path, chardev: Chardev, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "STUCK_SECONDS", 0.2)
    console = Console(tmp_path)
    flood = b"x" * (4 * 1024 * 1024)
    async with console.attach(ALL) as stuck, console.attach(ALL) as reader:
        async with asyncio.TaskGroup() as group:
            group.create_task(chardev.say(flood))
            assert await shown(reader, len(flood)) == flood
        assert stuck.too_slow
        assert not reader.too_slow
        kept = await shown(stuck, len(flood))
        assert 0 < len(kept) <= console_module.CHUNK * console_module.CHUNKS_AHEAD


async def test_a_slow_reader_gets_everything(tmp_path: Path, chardev: Chardev) -> None:
    console = Console(tmp_path)
    flood = bytes(range(256)) * 12 * 1024
    async with console.attach(ALL) as slow:
        async with asyncio.TaskGroup() as group:
            group.create_task(chardev.say(flood))
            text = b""
            async for chunk in slow.output():
                text += chunk.data
                await asyncio.sleep(0.002)
                if len(text) == len(flood):
                    break
        assert text == flood


async def test_typing_waits_for_the_machine_and_leaving_does_not(tmp_path: Path, chardev: Chardev) -> None:
    console = Console(tmp_path)
    chardev.listening.clear()
    async with asyncio.timeout(10), console.attach(ALL) as one:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(type_for_ever(one), 0.2)
    chardev.listening.set()
    await chardev.until_left()
