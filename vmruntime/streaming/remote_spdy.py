"""Exec and attach over SPDY: one stream each for error, stdin, stdout, stderr and resize."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from vmruntime.model.streams import AttachSpec, ExecSpec, OutputChunk, TerminalSize
from vmruntime.streaming import status
from vmruntime.streaming.errors import ClientGone, TimedOut
from vmruntime.streaming.remote import Outcome
from vmruntime.streaming.session import SpdySession, SpdyStream
from vmruntime.streaming.sizes import SizeDecoder
from vmruntime.streaming.spdy.connection import ResetStatus

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
"""Of the remotecommand protocol. Over SPDY v5 is v4; resizing came with v3; the last one is the first version."""

RESIZING = frozenset(PROTOCOLS[:3])
STREAM_LIMIT = 8
_TYPE = "streamtype"


def expected(spec: ExecSpec | AttachSpec, protocol: str) -> frozenset[str]:
    """Return the types of the streams a client opens for a request."""
    wanted = {"error": True, "stdin": spec.stdin, "stdout": spec.stdout, "stderr": spec.stderr}
    wanted["resize"] = spec.tty and protocol in RESIZING
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


class SpdyRemote:
    """Implements remote.RemoteStreams."""

    def __init__(self, session: SpdySession, protocol: str, streams: dict[str, SpdyStream]) -> None:
        self._session = session
        self._protocol = protocol
        self._streams = streams
        self._decoder = SizeDecoder()
        self._sizes: Iterator[TerminalSize] = iter(())
        resize = streams.get("resize")
        self._resize = resize
        if "error" in streams:
            session.forget(streams["error"])  # nothing is read of these
        for name in ("stdout", "stderr"):
            if name in streams:
                streams[name].incoming.drop()

    @classmethod
    async def open(cls, session: SpdySession, protocol: str, spec: ExecSpec | AttachSpec, timeout: float) -> SpdyRemote:
        """Wait for the client to open its streams.

        Raises:
            TimedOut: It did not within `timeout` seconds.
            ClientGone: It went away.
        """
        wanted = expected(spec, protocol)
        streams: dict[str, SpdyStream] = {}
        try:
            async with asyncio.timeout(timeout):
                while not wanted <= streams.keys():
                    stream = await session.accept()
                    if stream is None:
                        raise ClientGone("the client went away before it opened its streams")
                    kind = stream.headers.get(_TYPE, "")
                    if kind in streams or kind not in wanted:
                        await stream.reset(ResetStatus.REFUSED_STREAM)
                    else:
                        streams[kind] = stream
        except TimeoutError:
            missing = ", ".join(sorted(wanted - streams.keys()))
            raise TimedOut(f"the client did not open its streams within {timeout:g} s: {missing}") from None
        return cls(session, protocol, streams)

    async def greet(self) -> None:
        """Say nothing: the protocol has no word for it."""

    async def read_input(self) -> bytes:
        """Return input; b"" at its end."""
        stdin = self._streams.get("stdin")
        return await stdin.read() if stdin is not None else b""

    async def read_size(self) -> TerminalSize | None:
        """Return the terminal's next size."""
        while (size := next(self._sizes, None)) is None:
            data = await self._resize.read() if self._resize is not None else b""
            if not data:
                return None
            self._sizes = iter(self._decoder.receive(data))
        return size

    async def write(self, chunk: OutputChunk) -> None:
        """Send output."""
        stream = self._streams.get("stderr" if chunk.stderr else "stdout")
        if stream is not None:
            await stream.write(chunk.data)

    async def wait_gone(self) -> None:
        """Wait until the connection has ended."""
        await self._session.wait_gone()

    async def finish(self, outcome: Outcome) -> None:
        """Close the outputs, then say how it ended, then close the rest."""
        with contextlib.suppress(ClientGone):
            for name in ("stdout", "stderr"):
                await self._close(name)
            error = self._streams["error"]
            if outcome.failure:
                await error.write(status.failed(self._protocol, outcome.failure))
            elif outcome.end is not None:
                await error.write(status.exited(self._protocol, outcome.end))
            else:
                await error.write(status.success(self._protocol))
            for name in ("error", "stdin", "resize"):
                await self._close(name)

    async def _close(self, name: str) -> None:
        if stream := self._streams.get(name):
            await stream.close_write()
