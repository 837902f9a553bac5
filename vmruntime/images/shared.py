"""Work that several callers want at once and that is done once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
P = TypeVar("P")


@dataclasses.dataclass
class _Work(Generic[T]):
    task: asyncio.Task[T]
    callers: int = 0


class SharedWork(Generic[K, T]):
    """Runs one task a key for all who ask for it while it runs.

    The task belongs to its callers together, so it cannot live in the TaskGroup of any one of them: it is
    cancelled, and waited for, when the last of them is cancelled.
    """

    def __init__(self) -> None:
        self._running: dict[K, _Work[T]] = {}

    async def join(self, key: K, start: Callable[[], Awaitable[T]]) -> T:
        """Return the result of the work of this key, starting it when nobody has."""
        work = self._running.get(key)
        if work is None:
            work = _Work(asyncio.ensure_future(self._run(key, start)))
            self._running[key] = work
        work.callers += 1
        try:
            # Woken by: the work's end, or this caller's cancellation (which the shield keeps from the others).
            return await asyncio.shield(work.task)
        finally:
            work.callers -= 1
            if work.callers == 0 and not work.task.done():
                await self._cancel(key, work)

    async def _run(self, key: K, start: Callable[[], Awaitable[T]]) -> T:
        me = asyncio.current_task()
        try:
            return await start()
        finally:
            work = self._running.get(key)
            if work is not None and work.task is me:
                del self._running[key]

    async def _cancel(self, key: K, work: _Work[T]) -> None:
        # A newcomer must start afresh rather than join what is ending.
        if self._running.get(key) is work:
            del self._running[key]
        work.task.cancel()
        await asyncio.wait([work.task])
        if not work.task.cancelled():
            work.task.exception()  # it failed while ending; its caller is gone, so nobody else will ask


class ToldWork(Generic[K, T, P]):
    """Shared work that tells all who wait for it how far it is."""

    def __init__(self) -> None:
        self._work: SharedWork[K, T] = SharedWork()
        self._listeners: dict[K, list[Callable[[P], None]]] = {}

    async def join(
        self, key: K, start: Callable[[Callable[[P], None]], Awaitable[T]], listener: Callable[[P], None] | None
    ) -> T:
        """Return the result of the work of this key.

        Args:
            key: What makes work the same.
            start: Starts it, when nobody has; it is given what tells the listeners.
            listener: Called in the event loop; must not raise.
        """

        def tell(progress: P) -> None:
            for one in tuple(self._listeners.get(key, ())):
                one(progress)

        listeners = self._listeners.setdefault(key, [])
        if listener is not None:
            listeners.append(listener)
        try:
            return await self._work.join(key, lambda: start(tell))
        finally:
            if listener is not None:
                listeners.remove(listener)
            if not listeners and self._listeners.get(key) is listeners:
                del self._listeners[key]
