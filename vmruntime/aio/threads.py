"""Blocking calls, kept out of the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class SerialThread:
    """One thread that runs blocking calls one after another, for libraries bound to a thread (sqlite3, libvirt)."""

    def __init__(self, name: str) -> None:
        self._executor = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[[], T]) -> T:
        """Run `function` in the thread and return its result; its exception is raised here.

        A cancelled caller still waits until the call is over: half a transaction is nobody's.
        """
        future = asyncio.wrap_future(self._executor.submit(function))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not future.done():
                await asyncio.wait([future])
            raise

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._executor.shutdown(wait=True)
