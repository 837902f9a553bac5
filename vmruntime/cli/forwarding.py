"""Ports of this machine that lead to ports of a pod, over SPDY, which can close one direction of a connection."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import ssl
from collections.abc import Callable, Sequence

from vmruntime.aio.beside import together
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import InvalidArgument, Unavailable
from vmruntime.streaming.client import open_spdy
from vmruntime.streaming.errors import ClientGone, StreamingError
from vmruntime.streaming.portforward import SPDY_PROTOCOLS
from vmruntime.streaming.session import SpdySession, SpdyStream

_CHUNK = 64 * 1024
_LAST_PORT = 65535


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forwarded port; 0 here takes any free one."""

    local: int
    remote: int

    @classmethod
    def parse(cls, text: str) -> Forward:
        """Return what `LOCAL:REMOTE`, `:REMOTE` or `PORT` means; raise InvalidArgument when it means nothing."""
        left, colon, right = text.rpartition(":")
        numbers = [part for part in (left, right) if part or part is right]
        if not all(part.isascii() and part.isdigit() and int(part[:6]) <= _LAST_PORT for part in numbers):
            raise InvalidArgument.field("PORT", text, "is no port", remedy="such as 8080:80, :80 or 80")
        remote = int(right)
        if remote == 0:
            raise InvalidArgument.field("PORT", text, "names no port of the pod", remedy="such as 8080:80")
        local = remote if not colon else int(left or 0)
        return cls(local, remote)


async def forward(
    url: str,
    address: str,
    forwards: Sequence[Forward],
    say: Callable[[str], None],
    complain: Callable[[str], None],
    context: ssl.SSLContext | None = None,
) -> None:
    """Listen and forward until the daemon ends the session.

    Args:
        url: What CRI's PortForward answered.
        address: Where to listen.
        forwards: Which ports.
        say: Told of each port when it is open.
        complain: Told of connections that cannot be made.
        context: How to verify the daemon.

    Raises:
        Unavailable: A port cannot be listened on, or the session ended.
    """
    try:
        async with open_spdy(url, SPDY_PROTOCOLS, context) as (session, _):
            forwarder = _Forwarder(session, complain)
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(forwarder.close)
                for one in forwards:
                    await _listen(stack, forwarder, address, one, say)
                await session.wait_gone()
    except StreamingError as error:
        raise Unavailable(f"the connection to the daemon broke: {error}") from error
    raise Unavailable("the daemon ended the forwarding", remedy="the pod may have stopped")


async def _listen(
    stack: contextlib.AsyncExitStack, forwarder: _Forwarder, address: str, one: Forward, say: Callable[[str], None]
) -> None:
    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forwarder.start(reader, writer, one.remote)

    try:
        server = await asyncio.start_server(accept, address, one.local)
    except OSError as error:
        raise Unavailable(f"cannot listen on {address} port {one.local}: {error.strerror or error}") from error
    stack.callback(server.close)
    bound = server.sockets[0].getsockname()
    say(f"{bound[0]}:{bound[1]} -> {one.remote}")


class _Forwarder:
    """The connections of one session."""

    def __init__(self, session: SpdySession, complain: Callable[[str], None]) -> None:
        self._session = session
        self._complain = complain
        self._numbers = itertools.count()
        self._scope = TaskScope("port-forward")

    def start(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        """Serve a connection in the background."""
        self._scope.start(self._serve(reader, writer, port), f"connection to {port}", owning=writer.close)

    async def close(self) -> None:
        """Break off what is under way."""
        await self._scope.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        headers = {"port": str(port), "requestID": str(next(self._numbers))}
        try:
            error = await self._session.open({"streamType": "error", **headers})
            await error.close_write()
            data = await self._session.open({"streamType": "data", **headers})
            try:
                # The pod's side says on the error stream that it is done, or why not; only then all has been said.
                await together(_transfer(reader, writer, data), self._errors(error))
            finally:
                await data.reset()
                self._session.forget(data)
                self._session.forget(error)
        except (ClientGone, OSError):
            pass  # one side is gone; the other sees its connection end
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _errors(self, error: SpdyStream) -> None:
        text = b""
        while data := await error.read():
            text += data
        if text:
            self._complain(text.decode(errors="replace"))
            raise ClientGone("the pod refused")


async def _transfer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: SpdyStream) -> None:
    await together(_upwards(reader, data), _downwards(data, writer))
    await data.reset()


async def _upwards(reader: asyncio.StreamReader, data: SpdyStream) -> None:
    while chunk := await reader.read(_CHUNK):
        await data.write(chunk)
    await data.close_write()


async def _downwards(data: SpdyStream, writer: asyncio.StreamWriter) -> None:
    while chunk := await data.read():
        writer.write(chunk)
        await writer.drain()
    writer.write_eof()
