"""A console that QEMU writes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vmruntime.hypervisor import console as module
from vmruntime.hypervisor.console import ConsoleFile


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(module, "CHUNK_BYTES", 16)


async def test_a_line_that_comes_in_pieces_and_late(tmp_path: Path) -> None:
    waiting = asyncio.ensure_future(ConsoleFile(tmp_path).wait_for("guest is ready"))
    with (tmp_path / "console.log").open("ab", buffering=0) as file:
        for piece in (b"x" * 40, b"\nthe gue", b"st is re", b"ady\n"):
            await asyncio.sleep(0.01)
            assert not waiting.done()
            file.write(piece)
    async with asyncio.timeout(10):
        await waiting


async def test_a_line_that_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_bytes(b"boot\r\n" * 100 + b"ready\r\n")
    async with asyncio.timeout(10):
        await ConsoleFile(tmp_path).wait_for("ready")


async def test_what_is_long_past_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEARCHED_BYTES", 64)
    (tmp_path / "console.log").write_bytes(b"ready\n" + b"x" * 64)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await ConsoleFile(tmp_path).wait_for("ready")


def test_its_last_lines(tmp_path: Path) -> None:
    console = ConsoleFile(tmp_path)
    assert console.tail() == ""
    lines = [f"line {number}" for number in range(20)]
    (tmp_path / "console.log").write_bytes("\r\n".join([*lines, "\x1b[0mlast\0"]).encode())
    assert console.tail().splitlines() == [*lines[-11:], "[0mlast"]
