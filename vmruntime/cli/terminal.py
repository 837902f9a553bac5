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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from vmruntime.cli.sessions import Detached, Sink
from vmruntime.model.streams import TerminalSize

DETACH_KEYS = (b"\x10\x11",)
"""Ctrl-P Ctrl-Q, as elsewhere."""

CONSOLE_KEYS = (*DETACH_KEYS, b"\x1d")
"""Ctrl-] too, as of virsh console and telnet: guests' shells take Ctrl-P for the last command."""

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


async def read_stdin(*, leave: Sequence[bytes] = ()) -> AsyncIterator[bytes]:
    """Iterate over what is typed or piped in; `leave` are the detach keys, one sequence or several.

    Raises:
        Detached: The detach keys were pressed.
    """
    incoming = _Incoming(asyncio.get_running_loop())
    # A thread of its own, which nobody waits for: it may sit in read(2) until somebody types.
    threading.Thread(target=incoming.fill, args=(_source(),), daemon=True).start()
    keys = DetachKeys(leave)
    while data := await incoming.next():
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

    def __init__(self, sequences: Sequence[bytes] = DETACH_KEYS) -> None:
        self.pressed = False
        self._held = b""
        self._sequences = sequences

    def filter(self, data: bytes) -> bytes:
        """Return what is to be passed on: all before the keys; the first keys alone are held until the next."""
        data = self._held + data
        places = [place for keys in self._sequences if (place := data.find(keys)) >= 0]
        if places:
            self.pressed = True
            return data[: min(places)]
        self._held = self._beginning(data)
        return data.removesuffix(self._held) if self._held else data

    def _beginning(self, data: bytes) -> bytes:
        """Return the longest end of what is typed that may become a sequence."""
        starts = [keys[:length] for keys in self._sequences for length in range(1, len(keys))]
        return max((start for start in starts if data.endswith(start)), key=len, default=b"")


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
