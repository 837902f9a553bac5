"""SPDY streams over a wire, for either end of it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Mapping

from vmruntime.streaming.errors import ClientGone, ProtocolError
from vmruntime.streaming.pipe import Budget, Pipe, wait_room
from vmruntime.streaming.spdy.connection import (
    Connection,
    DataReceived,
    Event,
    GoAway,
    ResetStatus,
    StreamOpened,
    StreamReplied,
    StreamReset,
)
from vmruntime.streaming.wire import Idle, Wire

BUFFER_LIMIT = 4 * 1024 * 1024
"""Bytes that wait in all streams of a connection; then nothing more is read of it."""

LINGER_SECONDS = 5.0
WRITE_PIECE = 64 * 1024


class SpdyStream:
    """One stream."""

    def __init__(self, session: SpdySession, stream_id: int, headers: Mapping[str, str], budget: Budget) -> None:
        self.id = stream_id
        self.headers = headers
        self._session = session
        self._accepted = False
        self._replied = asyncio.Event()
        self._reset = asyncio.Event()
        self.incoming = Pipe(budget)

    @property
    def was_reset(self) -> bool:
        """Whether the peer ended it before its time."""
        return self._reset.is_set()

    async def read(self) -> bytes:
        """Return what has arrived; b"" at the end."""
        return await self.incoming.read()

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the peer takes none. After a reset they are dropped."""
        for at in range(0, len(data), WRITE_PIECE):
            await self._session.send(self.id, data[at : at + WRITE_PIECE])

    async def close_write(self) -> None:
        """Say that no more bytes come."""
        await self._session.send(self.id, b"", fin=True)

    async def reset(self, status: ResetStatus = ResetStatus.CANCEL) -> None:
        """End it at once, in both directions."""
        self.incoming.drop()
        await self._session.reset(self.id, status)

    async def wait_reset(self) -> None:
        """Wait until the peer ends it before its time, or the connection is gone."""
        await self._reset.wait()

    async def wait_replied(self) -> None:
        """Wait until the peer has accepted it; raise ClientGone when it refuses."""
        await self._replied.wait()
        if not self._accepted:  # one that is accepted and reset at once may still have something to say
            raise ClientGone("the peer refused a stream")

    def note_reply(self) -> None:
        """The peer accepted it."""
        self._accepted = True
        self._replied.set()

    def note_reset(self) -> None:
        """The peer ended it, or the connection is gone. What had arrived can still be read."""
        self.incoming.end()
        self._reset.set()
        self._replied.set()


class SpdySession:
    """A connection's streams. run() has to run for anything to happen."""

    def __init__(self, wire: Wire, *, client: bool = False, stream_limit: int, idle: Idle | None = None) -> None:
        """Begin.

        Args:
            wire: The connection, after the upgrade.
            client: Which end this is.
            stream_limit: Streams the peer may have open at once.
            idle: Told of data that flows.
        """
        self._wire = wire
        self._client = client
        self._connection = Connection(client=client, stream_limit=stream_limit)
        self._budget = Budget(BUFFER_LIMIT)
        self._streams: dict[int, SpdyStream] = {}
        self._opened: collections.deque[SpdyStream] = collections.deque()
        self._arrived = asyncio.Event()
        self._stream_limit = stream_limit
        self._idle = idle
        self._gone = asyncio.Event()

    async def run(self) -> None:
        """Read until the connection ends.

        Raises:
            ProtocolError: The peer broke the protocol.
        """
        try:
            while not self._gone.is_set():
                chunk = await self._wire.read()
                if not chunk:
                    return
                for event in self._connection.receive(chunk):
                    await self._handle(event)
                self._wire.send(self._connection.answers())
                await self._wire.drain()  # a peer that takes no replies is not read from, either
        except ClientGone:
            return
        finally:
            self._gone.set()
            self._arrived.set()
            for stream in list(self._streams.values()):
                stream.note_reset()

    async def accept(self) -> SpdyStream | None:
        """Return the next stream the peer opens; None when the connection has ended."""
        while not self._opened:
            if self._gone.is_set():
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._opened.popleft()

    async def open(self, headers: Mapping[str, str]) -> SpdyStream:
        """Open a stream and wait until the peer accepts it; raise ClientGone when it does not."""
        stream_id, frame = self._connection.open(headers)
        stream = SpdyStream(self, stream_id, headers, self._budget)
        self._streams[stream_id] = stream
        await self._send(frame)
        await stream.wait_replied()
        return stream

    async def wait_gone(self) -> None:
        """Wait until the connection has ended."""
        await self._gone.wait()

    async def send(self, stream_id: int, data: bytes, *, fin: bool = False) -> None:
        """Send data of a stream; see SpdyStream.write."""
        if self._idle is not None:
            self._idle.touch()
        await self._send(self._connection.send(stream_id, data, fin=fin))

    async def reset(self, stream_id: int, status: ResetStatus) -> None:
        """End a stream; see SpdyStream.reset."""
        self._streams.pop(stream_id, None)
        await self._send(self._connection.reset(stream_id, status))

    def forget(self, stream: SpdyStream) -> None:
        """Drop what a stream still receives: nobody will read it."""
        stream.incoming.drop()
        self._streams.pop(stream.id, None)

    async def close(self) -> None:
        """Announce the end and close; as the server, give the peer a moment to read everything and close first."""
        with contextlib.suppress(ClientGone, TimeoutError):
            for stream in list(self._streams.values()):
                stream.incoming.drop()  # so that reading goes on until the peer's end
            await self._send(self._connection.go_away())
            if not self._client:
                async with asyncio.timeout(LINGER_SECONDS):
                    await self._gone.wait()
        await self._wire.close()

    async def _send(self, frames: bytes) -> None:
        if self._gone.is_set():
            raise ClientGone("the connection is closed")
        if frames:
            self._wire.send(frames)
            await self._wire.drain()

    async def _handle(self, event: Event) -> None:
        match event:
            case StreamOpened():
                stream = SpdyStream(self, event.stream_id, event.headers, self._budget)
                if event.fin:
                    stream.incoming.end()
                self._streams[event.stream_id] = stream
                # The peer drops data of a stream that was not answered, so the answer is first on the wire.
                self._wire.send(self._connection.reply(event.stream_id))
                if len(self._opened) >= self._stream_limit:  # opened and reset faster than anyone looks
                    raise ProtocolError("too many streams are opened at once")
                self._opened.append(stream)
                self._arrived.set()
            case StreamReplied():
                if replied := self._streams.get(event.stream_id):
                    replied.note_reply()
                    if event.fin:
                        replied.incoming.end()
            case DataReceived():
                await self._received(event)
            case StreamReset():
                if ended := self._streams.pop(event.stream_id, None):
                    ended.note_reset()
            case GoAway():
                pass  # the peer closes when it has what it wants

    async def _received(self, event: DataReceived) -> None:
        if self._idle is not None:
            self._idle.touch()
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        await wait_room(stream.incoming, self._wire.peer_gone)
        stream.incoming.put(event.data)
        if event.fin:
            stream.incoming.end()
