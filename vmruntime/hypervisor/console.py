"""The guest's serial console as a bounded file on the host.

QEMU listens on a unix socket and drops what nobody reads; the daemon connects before the guest runs and again
after its own restart. The file is cut in two generations so that a guest that writes without end cannot fill the
host's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

GENERATION_BYTES = 512 * 1024
TAIL_BYTES = 16 * 1024
LINE_BYTES = 4096


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

    def tail(self, lines: int = 12) -> str:
        """Return the last lines, printable, for an error message; empty when nothing was said."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        clean = "".join(c if c.isprintable() or c == "\n" else "" for c in text)
        return "\n".join([line for line in clean.splitlines() if line.strip()][-lines:])

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


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
