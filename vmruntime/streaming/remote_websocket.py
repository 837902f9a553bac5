"""Exec and attach over WebSocket channels: 0 stdin, 1 stdout, 2 stderr, 3 error, 4 resize."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vmruntime.model.streams import AttachSpec, ExecSpec, OutputChunk, TerminalSize
from vmruntime.streaming import status
from vmruntime.streaming.channel_session import ChannelSession
from vmruntime.streaming.errors import ClientGone
from vmruntime.streaming.remote import Outcome
from vmruntime.streaming.sizes import SizeDecoder
from vmruntime.streaming.websocket.channels import V1, V1_BASE64, V4, V4_BASE64, V5

PROTOCOLS = (V5, V4, V4_BASE64, V1, V1_BASE64)

STDIN = 0
STDOUT = 1
STDERR = 2
ERROR = 3
RESIZE = 4
READABLE = (STDIN, RESIZE)


class WebSocketRemote:
    """Implements remote.RemoteStreams."""

    def __init__(self, session: ChannelSession, protocol: str, spec: ExecSpec | AttachSpec) -> None:
        self._session = session
        self._protocol = protocol
        self._spec = spec
        self._decoder = SizeDecoder()
        self._sizes: Iterator[TerminalSize] = iter(())

    async def greet(self) -> None:
        """Send an empty message: clients take it for the sign that the connection is up."""
        first = STDOUT if self._spec.stdout else STDERR if self._spec.stderr else ERROR
        await self._session.send(first, b"")

    async def read_input(self) -> bytes:
        """Return input; b"" at its end."""
        return await self._session.read(STDIN) if self._spec.stdin else b""

    async def read_size(self) -> TerminalSize | None:
        """Return the terminal's next size."""
        while (size := next(self._sizes, None)) is None:
            data = await self._session.read(RESIZE)
            if not data:
                return None
            self._sizes = iter(self._decoder.receive(data))
        return size

    async def write(self, chunk: OutputChunk) -> None:
        """Send output."""
        if self._spec.stderr if chunk.stderr else self._spec.stdout:
            await self._session.send(STDERR if chunk.stderr else STDOUT, chunk.data)

    async def wait_gone(self) -> None:
        """Wait until the connection has ended."""
        await self._session.wait_gone()

    async def finish(self, outcome: Outcome) -> None:
        """Say how it ended."""
        if outcome.failure:
            text = status.failed(self._protocol, outcome.failure)
        elif outcome.end is not None:
            text = status.exited(self._protocol, outcome.end)
        else:
            text = status.success(self._protocol)
        if text:
            with contextlib.suppress(ClientGone):
                await self._session.send(ERROR, text)
