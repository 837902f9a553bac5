"""Port-forward: streams or channels of a client joined to connections in a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Sequence
from typing import Protocol

import structlog

from vmruntime.agent.interface import PortDialer, PortStream
from vmruntime.aio.beside import beside, together
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import Code, VmruntimeError
from vmruntime.streaming.channel_session import ChannelSession
from vmruntime.streaming.errors import ClientGone
from vmruntime.streaming.session import SpdySession, SpdyStream
from vmruntime.streaming.spdy.connection import ResetStatus
from vmruntime.streaming.websocket.channels import V4, V4_BASE64

log = structlog.get_logger(__name__)

SPDY_PROTOCOLS = ("portforward.k8s.io",)
TUNNEL_PROTOCOLS = ("SPDY/3.1+portforward.k8s.io",)
CHANNEL_PROTOCOLS = (V4, V4_BASE64)
STREAM_LIMIT = 2048
"""Streams a client may have open in one session, two for each connection."""

_TYPE, _PORT, _REQUEST = "streamtype", "port", "requestid"
_LAST_PORT = 65535


class Flow(Protocol):
    """The client's end of one connection."""

    async def read(self) -> bytes:
        """Return what it sent; b"" at the end."""

    async def write(self, data: bytes) -> None:
        """Send it bytes, waiting while it takes none."""

    async def close_write(self) -> None:
        """Say that no more bytes come."""


async def join(flow: Flow, connection: PortStream) -> None:
    """Copy in both directions, each to its own end."""

    async def upwards() -> None:
        while data := await flow.read():
            await connection.write(data)
        await connection.close_write()

    async def downwards() -> None:
        async for data in connection.read():
            await flow.write(data)
        await flow.close_write()

    await together(upwards(), downwards())


class _Pair:
    """The two streams of one connection, as far as they have come."""

    def __init__(self) -> None:
        self.data: SpdyStream | None = None
        self.error: SpdyStream | None = None
        self.complete = asyncio.Event()

    def add(self, stream: SpdyStream) -> bool:
        """Take a stream; False when there is one of its type."""
        if stream.headers[_TYPE] == "data":
            if self.data is not None:
                return False
            self.data = stream
        else:
            if self.error is not None:
                return False
            self.error = stream
        if self.data is not None and self.error is not None:
            self.complete.set()
        return True


class SpdyForwarder:
    """One client's session over SPDY: each pair of streams (data, error) of one request id is a connection."""

    def __init__(self, session: SpdySession, ports: PortDialer, pod: str, creation_timeout: float) -> None:
        self._session = session
        self._ports = ports
        self._pod = pod
        self._timeout = creation_timeout
        self._pairs: dict[str, _Pair] = {}
        self._scope = TaskScope(f"port-forward {pod[:13]}")

    async def run(self) -> None:
        """Serve until the client goes."""
        try:
            while (stream := await self._session.accept()) is not None:
                await self._take(stream)
        finally:
            await self._scope.close()

    async def _take(self, stream: SpdyStream) -> None:
        headers = stream.headers
        port = headers.get(_PORT, "")
        kind = headers.get(_TYPE, "")
        if not is_port(port) or kind not in ("data", "error"):
            await self._reset(stream, ResetStatus.PROTOCOL_ERROR)
            return
        # Clients before request ids open the error stream and then, two numbers later, the data stream.
        request = headers.get(_REQUEST) or f"-{stream.id - (2 if kind == 'data' else 0)}"
        pair = self._pairs.get(request)
        if pair is None:
            pair = self._pairs[request] = _Pair()
            self._scope.start(self._serve(request, pair), f"request {request[:20]}")
        if not pair.add(stream):
            await self._reset(stream, ResetStatus.PROTOCOL_ERROR)

    async def _serve(self, request: str, pair: _Pair) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await pair.complete.wait()
        except TimeoutError:
            await self._give_up(pair, f"request {request}: not both streams were opened within {self._timeout:g} s")
            return
        finally:
            self._pairs.pop(request, None)
        data, error = pair.data, pair.error
        assert data is not None
        assert error is not None
        error.incoming.drop()
        try:
            with contextlib.suppress(ClientGone):
                await self._forward(data, error)
        finally:
            self._session.forget(data)
            self._session.forget(error)

    async def _forward(self, data: SpdyStream, error: SpdyStream) -> None:
        port = int(data.headers[_PORT])
        try:
            async with self._ports.connect(port) as connection:
                async with beside(_until_reset(data)):
                    await join(data, connection)
        except _WasReset:
            pass  # the client wants no more of it
        except VmruntimeError as failure:
            await self._failed(data, error, port, failure)
        await error.close_write()

    async def _failed(self, data: SpdyStream, error: SpdyStream, port: int, failure: VmruntimeError) -> None:
        log.info("port-forward failed", sandbox=self._pod, port=port, error=str(failure))
        if failure.code is not Code.ABORTED:
            # Anything on the error stream makes kubectl end the whole session, so a connection that merely broke is
            # told as such.
            await error.write(failure_text(port, self._pod, failure))
            await error.close_write()
            await data.close_write()
        await data.reset()

    async def _give_up(self, pair: _Pair, text: str) -> None:
        with contextlib.suppress(ClientGone):
            if pair.error is not None:
                await pair.error.write(text.encode())
                await pair.error.close_write()
                self._session.forget(pair.error)
            if pair.data is not None:
                await self._reset(pair.data, ResetStatus.CANCEL)

    async def _reset(self, stream: SpdyStream, why: ResetStatus) -> None:
        with contextlib.suppress(ClientGone):
            await stream.reset(why)
        self._session.forget(stream)


class _WasReset(Exception):
    """Raised when the client ended a stream before its time."""


async def _until_reset(stream: SpdyStream) -> None:
    await stream.wait_reset()
    raise _WasReset


def is_port(text: str) -> bool:
    """Whether a client's text is a port's number, written as anybody would write it."""
    return text.isascii() and text.isdigit() and len(text) <= len(str(_LAST_PORT)) and 0 < int(text) <= _LAST_PORT


def failure_text(port: int, pod: str, failure: VmruntimeError) -> bytes:
    """Return what the error stream says of a connection that could not be made."""
    return f"error forwarding port {port} to pod {pod}: {failure}".encode()


class _ChannelFlow:
    """Implements Flow on a WebSocket channel, which cannot be closed in one direction."""

    def __init__(self, session: ChannelSession, channel: int) -> None:
        self._session = session
        self._channel = channel

    async def read(self) -> bytes:
        return await self._session.read(self._channel)

    async def write(self, data: bytes) -> None:
        await self._session.send(self._channel, data)

    async def close_write(self) -> None:
        raise _PortClosed


class _PortClosed(Exception):
    """Raised to end a connection whose port has said all it has to say."""


async def forward_channels(session: ChannelSession, ports: PortDialer, pod: str, numbers: Sequence[int]) -> None:
    """Serve one connection to each port: channel 2n carries data and 2n+1 errors of port n.

    Each channel begins with the port's number, two bytes little-endian. Returns when all connections have ended.
    """
    await together(*(_forward_channel(session, ports, pod, index, port) for index, port in enumerate(numbers)))


async def _forward_channel(session: ChannelSession, ports: PortDialer, pod: str, index: int, port: int) -> None:
    data, error = 2 * index, 2 * index + 1
    number = struct.pack("<H", port)
    await session.send(data, number)
    await session.send(error, number)
    try:
        async with ports.connect(port) as connection:
            await join(_ChannelFlow(session, data), connection)
    except _PortClosed:
        pass
    except VmruntimeError as failure:
        log.info("port-forward failed", sandbox=pod, port=port, error=str(failure))
        await session.send(error, failure_text(port, pod, failure))
