"""The channel to a guest agent: one command after another, and always an answer to the command that was asked."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmruntime.qga.errors import QgaGone, QgaLied, QgaSilent
from vmruntime.qga.wire import SENTINEL, Lines, encode, result

ANSWER_LIMIT = 1024 * 1024
"""Bytes of an answer, unless the caller expects more."""

STALE_LIMIT = 64 * 1024 * 1024
"""Bytes that are passed over on the way to an answer; the longest stale one is that of guest-exec-status."""

_SYNC_LIMIT = 4096


class Channel:
    """A connection to the agent's virtio-serial port on the host.

    Answers carry no mark of what they answer. So after a command whose answer nobody waited for (a time-out, a cancelled
    caller) the next one begins with guest-sync-delimited: everything before its answer is stale.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lines = Lines()
        self._turn = asyncio.Lock()
        self._in_step = False
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it is known to have ended."""
        return self._closed

    @classmethod
    async def connect(cls, path: Path) -> Channel:
        """Connect to the socket of a chardev, which serves one client at a time.

        Raises:
            QgaGone: Nobody listens there.
        """
        try:
            return cls(*await asyncio.open_unix_connection(str(path)))
        except OSError as error:
            raise QgaGone from error

    async def call(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float, limit: int = ANSWER_LIMIT
    ) -> Any:
        """Run a command and return what the agent answers, as JSON has it.

        Args:
            command: Such as guest-ping.
            arguments: As JSON takes them.
            timeout: Seconds, with the commands of others that are before it.
            limit: Most bytes of the answer.

        Raises:
            QgaError: The agent refuses.
            QgaSilent: There is no answer in time; the agent may obey all the same.
            QgaGone: The channel ended.
            QgaLied: The answer breaks the protocol; after one that is too long the channel is closed.
        """
        try:
            async with asyncio.timeout(timeout), self._turn:
                await self._synchronise()
                self._in_step = False
                await self._send(encode(command, arguments or {}))
                line = await self._line(limit)
                self._in_step = True
        except TimeoutError:
            raise QgaSilent(command, timeout) from None
        return self._result(command, line)

    async def tell(self, command: str, arguments: Mapping[str, Any], *, timeout: float, grace: float) -> None:
        """Run a command that is answered only when it fails, or when it ends the guest too soon for an answer.

        Args:
            command: Such as guest-shutdown.
            arguments: As JSON takes them.
            timeout: Seconds until it is sent.
            grace: Seconds to wait for a refusal.

        Raises:
            QgaError: The agent refuses.
            QgaSilent: It cannot be sent in time.
            QgaGone: The channel had ended before.
            QgaLied: The answer breaks the protocol.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._turn.acquire()
        except TimeoutError:
            raise QgaSilent(command, timeout) from None
        try:
            try:
                async with asyncio.timeout(timeout):
                    await self._synchronise()
                    self._in_step = False
                    await self._send(encode(command, arguments))
            except TimeoutError:
                raise QgaSilent(command, timeout) from None
            with contextlib.suppress(TimeoutError, QgaGone):
                async with asyncio.timeout(grace):
                    line = await self._line(ANSWER_LIMIT)
                    self._in_step = True
                    self._result(command, line)
        finally:
            self._turn.release()

    async def close(self) -> None:
        """Let go of the channel."""
        self._closed = True
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _synchronise(self) -> None:
        """Make sure that what comes next answers what is asked next."""
        if self._closed:
            raise QgaGone
        if self._in_step:
            return
        number = secrets.randbits(53)  # what every JSON parser takes for an integer
        # The sentinel ends whatever the agent has half read.
        await self._send(SENTINEL + encode("guest-sync-delimited", {"id": number}))
        passed = 0
        while True:
            if not self._lines.skip():
                passed += await self._more()
                if passed > STALE_LIMIT:
                    self._abort()
                    raise QgaLied(f"it sends more than {STALE_LIMIT} bytes and does not answer")
                continue
            # Of several sentinels the last counts; its answer may be an older one's.
            line = await self._line(_SYNC_LIMIT)
            with contextlib.suppress(QgaLied):
                if result("guest-sync-delimited", line.rpartition(SENTINEL)[2]) == number:
                    self._in_step = True
                    return

    def _result(self, command: str, line: bytes) -> Any:
        try:
            return result(command, line)
        except QgaLied:
            self._in_step = False
            raise

    async def _line(self, limit: int) -> bytes:
        while True:
            try:
                line = self._lines.next(limit)
            except QgaLied as error:
                self._abort()
                raise error
            if line is None:
                await self._more()
            elif line.strip():
                return line

    async def _more(self) -> int:
        try:
            data = await self._reader.read(65536)
        except OSError:
            data = b""
        if not data:
            self._closed = True
            raise QgaGone
        self._lines.feed(data)
        return len(data)

    async def _send(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            self._closed = True
            raise QgaGone from None

    def _abort(self) -> None:
        """Close a channel on which a guest floods: what is not read makes it wait."""
        self._closed = True
        self._writer.transport.abort()
