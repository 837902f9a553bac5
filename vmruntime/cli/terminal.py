"""This side's terminal and standard streams."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import AsyncIterator, Callable, Iterator

from vmruntime.cli.sessions import Detached, Sink
from vmruntime.model.streams import TerminalSize

DETACH_KEYS = b"\x10\x11"
"""Ctrl-P Ctrl-Q, as elsewhere."""

_CHUNK = 64 * 1024
_AHEAD = 4


def is_terminal() -> bool:
    """Whether stdin is one."""
    with contextlib.suppress(ValueError, OSError):
        return os.isatty(sys.stdin.fileno())
    return False


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Let every key pass through, Ctrl-C too, while the block runs; without a terminal: nothing."""
    if not is_terminal():
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # the default would throw away what was typed ahead
    try:
        yield
    finally:
        # Not before what was written has been shown; what was typed ahead is for the shell.
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def read_stdin(*, detachable: bool = False) -> AsyncIterator[bytes]:
    """Iterate over what is typed or piped in.

    Raises:
        Detached: The detach keys were pressed.
    """
    incoming = _Incoming(asyncio.get_running_loop())
    # A thread of its own, which nobody waits for: it may sit in read(2) until somebody types.
    threading.Thread(target=incoming.fill, args=(_source(),), daemon=True).start()
    keys = DetachKeys()
    while data := await incoming.next():
        if detachable:
            data = keys.filter(data)
        if data:
            yield data
        if keys.pressed:
            raise Detached


def _source() -> Callable[[], bytes]:
    """Return what reads stdin: the descriptor, since a buffer's lock would be held when the program ends."""
    try:
        fd = sys.stdin.fileno()
    except (ValueError, OSError):
        return lambda: sys.stdin.buffer.read(_CHUNK)
    return lambda: os.read(fd, _CHUNK)


class _Incoming:
    """What a thread has read, a little ahead of the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)

    def fill(self, source: Callable[[], bytes]) -> None:
        """Read to the end; in the thread."""
        data = b"-"
        while data:
            self._room.acquire()
            try:
                data = source()
            except OSError:
                data = b""
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, data)
            except RuntimeError:
                return  # the loop has ended

    async def next(self) -> bytes:
        """Return what was read; b"" at the end."""
        data = await self._queue.get()
        self._room.release()
        return data


class DetachKeys:
    """Finds the detach keys among what is typed."""

    def __init__(self) -> None:
        self.pressed = False
        self._held = b""

    def filter(self, data: bytes) -> bytes:
        """Return what is to be passed on: all before the keys; a first key alone is held until the next."""
        data = self._held + data
        before, found, _ = data.partition(DETACH_KEYS)
        if found:
            self.pressed = True
            return before
        self._held = DETACH_KEYS[:1] if data.endswith(DETACH_KEYS[:1]) else b""
        return data.removesuffix(self._held) if self._held else data


async def sizes() -> AsyncIterator[TerminalSize]:
    """Iterate over the terminal's sizes: as it is, and whenever it changes."""
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        while True:
            changed.clear()  # before looking, so that no change is missed
            with contextlib.suppress(OSError):
                columns, rows = os.get_terminal_size(sys.stdin.fileno())
                yield TerminalSize(columns=columns, rows=rows)
            await changed.wait()
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


async def write_stdout(data: bytes) -> None:
    """Write to stdout at once."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def write_stderr(data: bytes) -> None:
    """Write to stderr at once."""
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()


def outputs() -> tuple[Sink, Sink]:
    """Return where a process's stdout and stderr go."""
    return write_stdout, write_stderr
