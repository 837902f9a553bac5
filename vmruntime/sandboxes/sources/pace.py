"""When work that no pod waits for is done: when no pod waits for other work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

PATIENCE = 10.0
"""Seconds after which work is done however busy the host is: else it might never be."""

PAUSE = 0.2
"""A pod that has just started has its containers made."""


class Pace:
    """Counts starts that go on."""

    def __init__(self) -> None:
        self._starts = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def start(self) -> Iterator[None]:
        """Say that a pod is being started."""
        self._starts += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._starts -= 1
            if not self._starts:
                self._idle.set()

    async def quiet(self) -> None:
        """Wait until no pod is being started, and has not been for a moment; not for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while True:
                    await self._idle.wait()
                    await asyncio.sleep(PAUSE)
                    if self._idle.is_set():
                        return
