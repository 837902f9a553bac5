"""WebSocket channels over a wire, for either end of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from vmruntime.streaming.errors import ClientGone
from vmruntime.streaming.pipe import Budget, Pipe, wait_room
from vmruntime.streaming.session import BUFFER_LIMIT, LINGER_SECONDS
from vmruntime.streaming.websocket.channels import NORMAL_CLOSURE, ChannelClosed, ChannelData, Channels, Closed
from vmruntime.streaming.wire import Idle, Wire


class ChannelSession:
    """A connection's channels. run() has to run for anything to happen."""

    def __init__(self, wire: Wire, channels: Channels, readable: Iterable[int], idle: Idle | None = None) -> None:
        """Begin.

        Args:
            wire: The connection, after the handshake.
            channels: Its protocol.
            readable: The channels somebody will read; what comes on others is dropped.
            idle: Told of data that flows.
        """
        self._wire = wire
        self._channels = channels
        budget = Budget(BUFFER_LIMIT)
        self._pipes = {number: Pipe(budget) for number in readable}
        self._idle = idle
        self._gone = asyncio.Event()
        self.greeted = asyncio.Event()
        """Set when the server has said that the process runs, or is joined."""
        self.close_code = 0
        """What the peer gave as its reason, 0 when it gave none."""

    async def run(self) -> None:
        """Read until the connection ends.

        Raises:
            ProtocolError: The peer broke the protocol.
        """
        try:
            while chunk := await self._wire.read():
                closed = await self._handle(chunk)
                if answers := self._channels.answers():
                    self._wire.send(answers)
                    await self._wire.drain()
                if closed:
                    return
        except ClientGone:
            return
        finally:
            self._gone.set()
            for pipe in self._pipes.values():
                pipe.end()

    async def read(self, channel: int) -> bytes:
        """Return what has arrived on a channel; b"" at its end."""
        return await self._pipes[channel].read()

    async def send(self, channel: int, data: bytes) -> None:
        """Send data on a channel, an empty message when there is none; raise ClientGone when the peer has gone."""
        if self._gone.is_set():
            raise ClientGone("the connection is closed")
        if self._idle is not None:
            self._idle.touch()
        self._wire.send(self._channels.send(channel, data))
        await self._wire.drain()

    async def close_channel(self, channel: int) -> None:
        """Say that no more comes on a channel, where the protocol can."""
        self._wire.send(self._channels.close_channel(channel))
        await self._wire.drain()

    async def wait_gone(self) -> None:
        """Wait until the connection has ended."""
        await self._gone.wait()

    async def close(self, code: int = NORMAL_CLOSURE) -> None:
        """Say goodbye, give the peer a moment to do so too, and close."""
        for pipe in self._pipes.values():
            pipe.drop()  # so that reading goes on until the peer's end
        self._wire.send(self._channels.close(code))
        with contextlib.suppress(ClientGone, TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._wire.drain()
                await self._gone.wait()
        await self._wire.close()

    async def _handle(self, chunk: bytes) -> bool:
        """Pass on what came; True when the connection is being closed."""
        for event in self._channels.receive(chunk):
            match event:
                case ChannelData():
                    await self._received(event)
                case ChannelClosed():
                    if pipe := self._pipes.get(event.channel):
                        pipe.end()
                case Closed():
                    self.close_code = event.code
                    return True
        return False

    async def _received(self, event: ChannelData) -> None:
        if self._idle is not None:
            self._idle.touch()
        if not event.data:
            self.greeted.set()
        elif pipe := self._pipes.get(event.channel):
            await wait_room(pipe, self._wire.peer_gone)
            pipe.put(event.data)
