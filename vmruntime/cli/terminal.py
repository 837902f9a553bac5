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
    tty.setraw(fd)
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
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(_AHEAD)
    # A thread of its own, which nobody waits for: it may sit in read(2) until somebody types.
    reader = threading.Thread(target=_read, args=(_source(), loop, queue), daemon=True)
    reader.start()
    keys = DetachKeys()
    while data := await queue.get():
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


def _read(source: Callable[[], bytes], loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[bytes]) -> None:
    with contextlib.suppress(RuntimeError, asyncio.CancelledError):  # the loop has ended
        while True:
            try:
                data = source()
            except OSError:
                data = b""
            asyncio.run_coroutine_threadsafe(queue.put(data), loop).result()
            if not data:
                return


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
            with contextlib.suppress(OSError):
                columns, rows = os.get_terminal_size(sys.stdin.fileno())
                yield TerminalSize(columns=columns, rows=rows)
            changed.clear()
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
