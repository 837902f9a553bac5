"""The other end: opens the URLs of a streaming server, for the command line and tests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from urllib.parse import urlsplit

import h11

from vmruntime.aio.beside import beside
from vmruntime.errors import InvalidArgument, Unavailable
from vmruntime.streaming.channel_session import ChannelSession
from vmruntime.streaming.session import SpdySession
from vmruntime.streaming.upgrade import SPDY
from vmruntime.streaming.websocket.channels import Channels, Tunnel
from vmruntime.streaming.websocket.handshake import VERSION, accept_token
from vmruntime.streaming.wire import SocketWire, TunnelWire, Wire

CONNECT_SECONDS = 20.0
_CHUNK = 16 * 1024
_ERROR_LIMIT = 4096
_KEY_BYTES = 16
_STREAMS_OF_THE_SERVER = 8


@contextlib.asynccontextmanager
async def open_channels(
    url: str, protocols: Sequence[str], readable: Iterable[int], context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[ChannelSession, str]]:
    """Open a WebSocket of numbered channels; yield it and its protocol.

    Args:
        url: What CRI answered.
        protocols: In the order of preference.
        readable: The channels that will be read.
        context: How to verify an https server; None: as any web server.

    Raises:
        Unavailable: Nobody answers, or the server refuses; the message has its words.
    """
    wire, protocol = await _websocket(url, protocols, context)
    session = ChannelSession(wire, Channels(protocol, client=True), readable)
    async with beside(session.run()):
        try:
            yield session, protocol
        finally:
            await session.close()


@contextlib.asynccontextmanager
async def open_spdy(
    url: str, protocols: Sequence[str], context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[SpdySession, str]]:
    """Open a SPDY connection; yield it and its protocol. Arguments and errors are open_channels()'s."""
    headers = [("Connection", "Upgrade"), ("Upgrade", SPDY)]
    headers += [("X-Stream-Protocol-Version", name) for name in protocols]
    wire, answer = await _upgrade(url, "POST", [*headers, ("Content-Length", "0")], context)
    async with _spdy(wire) as session:
        yield session, answer.get("x-stream-protocol-version", "")


@contextlib.asynccontextmanager
async def open_tunnel(
    url: str, protocols: Sequence[str], context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[SpdySession, str]]:
    """Open SPDY inside a WebSocket; yield it and its protocol. Arguments and errors are open_channels()'s."""
    wire, protocol = await _websocket(url, protocols, context)
    async with _spdy(TunnelWire(wire, Tunnel(client=True))) as session:
        yield session, protocol


@contextlib.asynccontextmanager
async def _spdy(wire: Wire) -> AsyncIterator[SpdySession]:
    session = SpdySession(wire, client=True, stream_limit=_STREAMS_OF_THE_SERVER)
    async with beside(session.run()):
        try:
            yield session
        finally:
            await session.close()


async def _websocket(url: str, protocols: Sequence[str], context: ssl.SSLContext | None) -> tuple[Wire, str]:
    key = base64.b64encode(os.urandom(_KEY_BYTES)).decode()
    headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", VERSION),
        ("Sec-WebSocket-Key", key),
    ]
    if protocols:
        headers.append(("Sec-WebSocket-Protocol", ", ".join(protocols)))
    wire, answer = await _upgrade(url, "GET", headers, context)
    if answer.get("sec-websocket-accept") != accept_token(key):
        await wire.close()
        raise Unavailable(f"{url}: the server's answer is not to this client's question")
    return wire, answer.get("sec-websocket-protocol", "")


async def _upgrade(
    url: str, method: str, headers: Sequence[tuple[str, str]], context: ssl.SSLContext | None
) -> tuple[Wire, dict[str, str]]:
    """Connect and ask for the upgrade; return the connection and the answer's headers."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgument.field("url", url, "is no absolute http or https URL")
    tls = (context or ssl.create_default_context()) if parts.scheme == "https" else None
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            port = parts.port or (443 if tls else 80)
            reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls)
            try:
                request = h11.Request(method=method, target=target, headers=[("Host", parts.netloc), *headers])
                return await _ask(reader, writer, request)
            except BaseException:
                writer.close()
                raise
    except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
        raise Unavailable(f"{parts.netloc}: {error or 'no answer'}") from error


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: h11.Request
) -> tuple[Wire, dict[str, str]]:
    http = h11.Connection(h11.CLIENT)
    writer.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    await writer.drain()
    answer: h11.Response | h11.InformationalResponse | None = None
    words = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.InformationalResponse):
            found = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
            if event.status_code == 101:
                return SocketWire(reader, writer, http.trailing_data[0]), found
        elif isinstance(event, h11.Response):
            answer = event
        elif isinstance(event, h11.Data):
            words = (words + event.data)[:_ERROR_LIMIT]
        else:
            status = answer.status_code if answer is not None else "no answer"
            raise Unavailable(f"the streaming server refuses ({status}): {words.decode(errors='replace').strip()}")
