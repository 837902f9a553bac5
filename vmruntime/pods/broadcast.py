"""Changes of pods, told to every listener."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from vmruntime.errors import Aborted
from vmruntime.pods.interface import PodEvent

BACKLOG = 4096


class Broadcast:
    """Fans events out. A listener that falls BACKLOG events behind is cut off rather than left to fill memory."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[PodEvent]] = set()

    def tell(self, event: PodEvent) -> None:
        """Hand an event to every listener."""
        for queue in list(self._queues):
            if queue.full():
                self._queues.discard(queue)
            else:
                queue.put_nowait(event)

    async def listen(self) -> AsyncIterator[PodEvent]:
        """Iterate over events from the first `anext` on.

        Raises:
            Aborted: The listener was too slow; it should list everything and listen again.
        """
        queue: asyncio.Queue[PodEvent] = asyncio.Queue(BACKLOG)
        self._queues.add(queue)
        try:
            while queue in self._queues or not queue.empty():
                yield await queue.get()
            raise Aborted("this listener fell too far behind", remedy="list everything and listen again")
        finally:
            self._queues.discard(queue)
