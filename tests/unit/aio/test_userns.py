"""Descriptors of user namespaces: nothing stays open, whatever happens to the caller."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmruntime.aio import userns

IDS = (0, 0, 1)


def descriptors() -> set[str]:
    """Return what the descriptors of this process lead to, user namespaces alone."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(entry))
    return {one for one in found if one.startswith("user:")}


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Put this process in place of one in a user namespace; its end takes for ever. Set: somebody waits for it."""
    event = asyncio.Event()

    @contextlib.asynccontextmanager
    async def namespace(*ids: object) -> AsyncIterator[int]:
        try:
            yield os.getpid()
        finally:
            event.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(userns, "user_namespace", namespace)
    return event


async def test_a_caller_cancelled_at_the_end_of_the_process_leaves_no_descriptor(ending: asyncio.Event) -> None:
    async def use() -> None:
        async with userns.user_namespace_fd(IDS, IDS):
            raise AssertionError("never reached")

    task = asyncio.ensure_future(use())
    await ending.wait()
    assert descriptors()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not descriptors()


async def test_a_callers_timeout_is_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the start of unshare is timed here; what the caller does meanwhile is not to be told as that."""
    program = tmp_path / "unshare"
    program.write_text("#!/bin/sh\necho\nread -r _\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(Path, "write_text", lambda *_: 0)
    with pytest.raises(TimeoutError, match="mine"):
        async with userns.user_namespace(IDS, IDS):
            raise TimeoutError("mine")
