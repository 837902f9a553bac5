"""Word of files that grow."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmruntime.aio import inotify
from vmruntime.aio.inotify import FileChanges


@pytest.fixture
def changes() -> Iterator[FileChanges]:
    found = FileChanges()
    yield found
    found.close()


async def woken(event: asyncio.Event) -> bool:
    """Whether it is told soon, and much sooner than by looking now and then."""
    try:
        async with asyncio.timeout(inotify.POLL_SECONDS / 2):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


async def test_each_who_armed_is_told_once(tmp_path: Path, changes: FileChanges) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.touch()
    other.touch()
    first, second, third = asyncio.Event(), asyncio.Event(), asyncio.Event()
    changes.arm(path, first.set)
    changes.arm(path, first.set)
    changes.arm(path, second.set)
    changes.arm(other, third.set)
    grow(path)
    assert await woken(first)
    assert second.is_set()
    assert not third.is_set()
    grow(path)
    assert not await woken(first)
    changes.arm(path, first.set)
    grow(path)
    assert await woken(first)
    grow(other)
    assert await woken(third)


async def test_a_file_that_went_is_forgotten(tmp_path: Path, changes: FileChanges) -> None:
    path = tmp_path / "a"
    path.touch()
    gone = asyncio.Event()
    changes.arm(path, gone.set)
    path.unlink()
    assert await woken(gone)


async def test_without_inotify_it_is_looked_now_and_then(
    tmp_path: Path, changes: FileChanges, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify, "POLL_SECONDS", 0.02)
    missing = asyncio.Event()
    changes.arm(tmp_path / "missing", missing.set)
    await asyncio.wait_for(missing.wait(), 5)
    changes.close()
    monkeypatch.setattr(inotify._libc, "inotify_init1", lambda _: -1)
    path = tmp_path / "a"
    path.touch()
    polled = asyncio.Event()
    changes.arm(path, polled.set)
    await asyncio.wait_for(polled.wait(), 5)
    changes.close()
