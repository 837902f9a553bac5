"""A connection's bytes: a socket, or a WebSocket that carries other bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Protocol

from vmruntime.streaming.errors import ClientGone, TimedOut
from vmruntime.streaming.websocket.channels import Tunnel

CHUNK = 64 * 1024
WRITE_AHEAD = 256 * 1024
CLOSE_SECONDS = 5.0

_TCP_CLOSE_WAIT = 8
_TCP_CLOSE = 7


class Wire(Protocol):
    """A connection to a peer."""

    async def read(self) -> bytes:
        """Return what has arrived; b"" at the end."""

    def send(self, data: bytes) -> None:
        """Queue bytes, in order; then call drain()."""

    async def drain(self) -> None:
        """Wait while too much is queued.

        Raises:
            ClientGone: The peer takes nothing any more.
        """

    def peer_gone(self) -> bool:
        """Whether the peer has closed, although not everything it sent has been read."""

    async def close(self) -> None:
        """Close; what is queued is still sent where that is possible."""


class SocketWire:
    """A TCP connection, with or without TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: bytes = b"") -> None:
        """Take over a connection.

        Args:
            reader: Its reading side.
            writer: Its writing side.
            received: Bytes that were read before.
        """
        self._reader = reader
        self._writer = writer
        self._received = received
        self._draining = asyncio.Lock()
        writer.transport.set_write_buffer_limits(high=WRITE_AHEAD)
        connection = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    async def read(self) -> bytes:
        """Return what has arrived; b"" at the end, whatever ended it."""
        if self._received:
            received, self._received = self._received, b""
            return received
        try:
            return await self._reader.read(CHUNK)
        except (OSError, ssl.SSLError):
            return b""

    def send(self, data: bytes) -> None:
        """Queue bytes."""
        if data and not self._writer.transport.is_closing():
            self._writer.write(data)

    async def drain(self) -> None:
        """Wait while too much is queued; raise ClientGone when the connection is lost."""
        try:
            async with self._draining:
                await self._writer.drain()
        except (OSError, ssl.SSLError) as error:
            raise ClientGone(str(error)) from error
        if self._writer.transport.is_closing():
            raise ClientGone("the connection is closed")

    def peer_gone(self) -> bool:
        """Ask the kernel for the connection's state (TCP_INFO, tcp(7)): reading would say so only after all data."""
        connection = self._writer.get_extra_info("socket")
        try:
            state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except (OSError, AttributeError):
            return True
        return state in (_TCP_CLOSE, _TCP_CLOSE_WAIT)

    async def close(self) -> None:
        """Close, waiting a moment for the peer to take what is queued."""
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._writer.wait_closed()
        except (OSError, ssl.SSLError, TimeoutError):
            self._writer.transport.abort()
        except asyncio.CancelledError:
            self._writer.transport.abort()
            raise


class TunnelWire:
    """A wire in the binary messages of a WebSocket."""

    def __init__(self, wire: Wire, tunnel: Tunnel) -> None:
        self._wire = wire
        self._tunnel = tunnel

    async def read(self) -> bytes:
        """Return what has arrived; b"" at the end."""
        while True:
            chunk = await self._wire.read()
            if not chunk:
                return b""
            found = self._tunnel.receive(chunk)
            self._wire.send(self._tunnel.answers())
            if found:
                return found
            if self._tunnel.closed:
                return b""

    def send(self, data: bytes) -> None:
        """Queue bytes."""
        if data:
            self._wire.send(self._tunnel.send(data))

    async def drain(self) -> None:
        """Wait while too much is queued."""
        await self._wire.drain()

    def peer_gone(self) -> bool:
        """Whether the peer has closed."""
        return self._wire.peer_gone()

    async def close(self) -> None:
        """Say goodbye and close."""
        self._wire.send(self._tunnel.close())
        await self._wire.close()


class Idle:
    """Ends a session in which nothing has flowed for too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = asyncio.get_running_loop().time()

    def touch(self) -> None:
        """Note that something flowed."""
        self._last = asyncio.get_running_loop().time()

    async def watch(self) -> None:
        """Never return.

        Raises:
            TimedOut: Nothing has flowed for the whole time.
        """
        loop = asyncio.get_running_loop()
        while (left := self._last + self._seconds - loop.time()) > 0:  # noqa: ASYNC110 (an event would cost each byte)
            await asyncio.sleep(left)
        raise TimedOut(f"nothing has flowed for {self._seconds:g} s")
