"""The command line's end of a process's streams: exec and attach over WebSocket channels."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

from vmruntime.aio.beside import beside, together
from vmruntime.config.settings import StreamingSettings
from vmruntime.errors import Internal, Unavailable
from vmruntime.model.streams import TerminalSize
from vmruntime.streaming.channel_session import ChannelSession
from vmruntime.streaming.client import open_channels
from vmruntime.streaming.errors import StreamingError
from vmruntime.streaming.remote_websocket import ERROR, RESIZE, STDERR, STDIN, STDOUT
from vmruntime.streaming.sizes import encode_size
from vmruntime.streaming.websocket.channels import V5

Sink = Callable[[bytes], Awaitable[None]]


class Detached(Exception):
    """Raised by an input that wants to leave the process to itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ends:
    """What the process's streams are joined to here.

    Attributes:
        stdout, stderr: Take what it writes.
        stdin: What it reads; None: nothing. An input that raises Detached ends the session.
        sizes: The terminal's sizes, when it has one.
        ready: Called when the process runs, or is joined.
        watch: Runs beside the session; what it raises ends it.
    """

    stdout: Sink
    stderr: Sink
    stdin: AsyncIterator[bytes] | None = None
    sizes: AsyncIterator[TerminalSize] | None = None
    ready: Callable[[], Awaitable[None]] | None = None
    watch: Callable[[], Awaitable[None]] | None = None


async def converse(url: str, ends: Ends, context: ssl.SSLContext | None = None) -> int:
    """Join this side's ends to the process behind a URL until it ends; return its exit status, 0 for attach.

    Raises:
        Detached: The input wanted so.
        Internal: The runtime failed; the message has its words.
        Unavailable: The connection broke.
    """
    readable = (STDOUT, STDERR, ERROR)
    try:
        async with open_channels(url, [V5], readable, context) as (session, _):
            async with beside(_input(session, ends), _sizes(session, ends), _ready(session, ends), _watch(ends)):
                status = bytearray()

                async def keep(data: bytes) -> None:
                    status.extend(data)

                await together(
                    _copy(session, STDOUT, ends.stdout),
                    _copy(session, STDERR, ends.stderr),
                    _copy(session, ERROR, keep),
                )
    except StreamingError as error:
        raise Unavailable(f"the connection to the daemon broke: {error}") from error
    return exit_status(bytes(status))


def exit_status(message: bytes) -> int:
    """Return the exit status that a metav1.Status tells.

    Raises:
        Internal: It tells of a failure of the runtime.
        Unavailable: There is none: the connection ended before the process.
    """
    if not message:
        raise Unavailable("the connection ended before the process did", remedy="see the daemon's log")
    try:
        status = json.loads(message)
        if status["status"] == "Success":
            return 0
        if status.get("reason") == "NonZeroExitCode":
            causes = status["details"]["causes"]
            return next(int(cause["message"]) for cause in causes if cause["reason"] == "ExitCode")
        raise Internal(str(status["message"]))
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise Internal(f"the daemon ended the session with {message[:200]!r}") from error


def tls_context(settings: StreamingSettings) -> ssl.SSLContext | None:
    """Return how to verify the daemon's certificate: it has to be the configured one, whatever name it is for."""
    if not settings.tls_cert:
        return None
    context = ssl.create_default_context(cafile=settings.tls_cert)
    context.check_hostname = False
    return context


async def _copy(session: ChannelSession, channel: int, sink: Sink) -> None:
    while data := await session.read(channel):
        await sink(data)


async def _input(session: ChannelSession, ends: Ends) -> None:
    if ends.stdin is None:
        return
    async for data in ends.stdin:
        await session.send(STDIN, data)
    await session.close_channel(STDIN)


async def _sizes(session: ChannelSession, ends: Ends) -> None:
    if ends.sizes is None:
        return
    async for size in ends.sizes:
        await session.send(RESIZE, encode_size(size))


async def _ready(session: ChannelSession, ends: Ends) -> None:
    if ends.ready is not None:
        await session.greeted.wait()
        await ends.ready()


async def _watch(ends: Ends) -> None:
    if ends.watch is not None:
        await ends.watch()


def run(work: Callable[[], Awaitable[int]]) -> int:
    """Run a conversation from code that waits."""

    async def carry() -> int:
        return await work()

    return asyncio.run(carry())
