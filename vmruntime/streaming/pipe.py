"""A bounded queue of bytes between the reader of a connection and whoever wants one stream of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vmruntime.streaming.errors import ClientGone

LIMIT = 256 * 1024
"""Bytes that wait in one pipe before its writer has to wait."""

TAKEN_AT_ONCE = 64 * 1024
GONE_INTERVAL = 1.0


class Budget:
    """Bytes that wait in all pipes of a connection together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.room = asyncio.Event()
        self.room.set()

    def change(self, count: int) -> None:
        """Count bytes that came or went."""
        self.used += count
        if self.used < self.limit:
            self.room.set()
        else:
            self.room.clear()


class Pipe:
    """One direction of one stream. put() does not wait; a writer that asks wait_room() first keeps it bounded."""

    def __init__(self, budget: Budget, limit: int = LIMIT) -> None:
        self._budget = budget
        self._limit = limit
        self._buffer = bytearray()
        self._ended = False
        self._dropped = False
        self._data = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def put(self, data: bytes) -> None:
        """Add bytes; after the end, or when nobody reads, they are dropped."""
        if self._ended or self._dropped or not data:
            return
        self._buffer += data
        self._budget.change(len(data))
        if len(self._buffer) >= self._limit:
            self._room.clear()
        self._data.set()

    def end(self) -> None:
        """No more bytes come."""
        self._ended = True
        self._data.set()

    def drop(self) -> None:
        """Nobody will read: forget what waits and what comes."""
        self._dropped = True
        self._budget.change(-len(self._buffer))
        self._buffer.clear()
        self._room.set()
        self._data.set()

    @property
    def has_room(self) -> bool:
        """Whether wait_room() would return at once."""
        return self._room.is_set() and (not self._buffer or self._budget.room.is_set())

    async def wait_room(self) -> None:
        """Wait until both this pipe and the budget have room.

        Where this pipe is empty the budget does not count: what is read of it may be what the others wait for.
        """
        await self._room.wait()
        if self._buffer:
            await self._budget.room.wait()

    async def read(self) -> bytes:
        """Return what waits, at most 64 KiB; b"" at the end."""
        while not self._buffer:
            if self._ended or self._dropped:
                return b""
            self._data.clear()
            await self._data.wait()
        data = bytes(self._buffer[:TAKEN_AT_ONCE])
        del self._buffer[: len(data)]
        self._budget.change(-len(data))
        if len(self._buffer) < self._limit:
            self._room.set()
        return data


async def wait_room(pipe: Pipe, peer_gone: Callable[[], bool]) -> None:
    """Wait until a pipe has room. Nothing is read of the connection meanwhile, so the peer's going is asked for.

    Raises:
        ClientGone: The peer has closed.
    """
    while not pipe.has_room:
        try:
            async with asyncio.timeout(GONE_INTERVAL):
                await pipe.wait_room()
        except TimeoutError:
            if peer_gone():
                raise ClientGone("the peer has closed while its data waited") from None
