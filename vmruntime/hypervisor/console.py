"""The guest's serial console as a file on the host.

With a kernel of ours, QEMU listens on a unix socket and drops what nobody reads; the daemon connects before the guest
runs and again after its own restart. The file is cut in two generations so that a guest that writes without end cannot
fill the host's memory. The console of a machine that boots from its disk is written by QEMU itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from pathlib import Path

from vmruntime.aio.pipeline import in_thread

GENERATION_BYTES = 512 * 1024
TAIL_BYTES = 16 * 1024
LINE_BYTES = 4096
SEARCHED_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 256 * 1024
POLL_SECONDS = 0.1


class ConsoleLog:
    """Copies a console socket into DIRECTORY/console.log, keeping one older generation as console.log.1."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "console.log"
        self._old = directory / "console.log.1"
        self._line = b""
        self._waiters: dict[bytes, asyncio.Event] = {}

    async def copy(self, socket: Path) -> None:
        """Read until the guest's end closes the socket."""
        reader, writer = await asyncio.open_unix_connection(str(socket))
        try:
            while data := await reader.read(65536):
                self._append(data)
        except ConnectionError:
            pass  # QEMU is gone; its exit is reported by who waits for the process
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def wait_for(self, text: str) -> None:
        """Wait until a line with this text is copied, or find that it was: a quick guest says it before it is asked."""
        wanted = text.encode()
        if any(wanted in _content(path) for path in (self.path, self._old)):
            return
        await self._waiters.setdefault(wanted, asyncio.Event()).wait()

    def tail(self) -> str:
        """Return the last lines, printable, for an error message; empty when nothing was said."""
        return last_lines(self.path)

    def _append(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
            size = file.tell()
        if size > GENERATION_BYTES:
            self.path.replace(self._old)
        self._wake(data)

    def _wake(self, data: bytes) -> None:
        """Look for awaited texts; a line may come in pieces."""
        seen = self._line + data
        for text, event in self._waiters.items():
            if text in seen:
                event.set()
        self._line = seen.rpartition(b"\n")[2][-LINE_BYTES:]


class ConsoleFile:
    """DIRECTORY/console.log as QEMU writes it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "console.log"

    async def wait_for(self, text: str) -> None:
        """Wait until there is a line with this text, in the last 4 MiB or later."""
        wanted, carried = text.encode(), b""
        position = max(0, await in_thread(lambda: _size(self.path)) - SEARCHED_BYTES)
        while True:
            data = await in_thread(functools.partial(_read, self.path, position))
            position += len(data)
            seen = carried + data
            if wanted in seen:
                return
            carried = seen.rpartition(b"\n")[2][-LINE_BYTES:]
            if len(data) < CHUNK_BYTES:
                await asyncio.sleep(POLL_SECONDS)

    def tail(self) -> str:
        """Return the last lines, printable, for an error message; empty when nothing was said."""
        return last_lines(self.path)


def last_lines(path: Path, lines: int = 12) -> str:
    """Return the last lines of a console, printable; empty when nothing was said."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""
    clean = "".join(c if c.isprintable() or c == "\n" else "" for c in text)
    return "\n".join([line for line in clean.splitlines() if line.strip()][-lines:])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read(CHUNK_BYTES)
    except FileNotFoundError:
        return b""


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
