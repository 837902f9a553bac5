"""Word of files that grow (inotify(7)): one instance for all of them, and nothing to do while they rest."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.25
"""How often to look where inotify cannot be used: the file is not there yet, or the user's instances are used up."""

_MODIFY = 0x0000_0002
_ONESHOT = 0x8000_0000
_HEADER = struct.Struct("iIII")
_READ = 65536

_libc = ctypes.CDLL(None, use_errno=True)

Wake = Callable[[], object]


class FileChanges:
    """Calls back once when a file is written to. It belongs to one event loop, which it is used in."""

    def __init__(self) -> None:
        self._fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, set[Wake]] = {}

    def arm(self, path: Path, wake: Wake) -> None:
        """Call `wake` once, soon after the next write; arming again before that changes nothing.

        Look at the file after this, not before: what was written in between is not told. `wake` may be called when
        nothing has changed, too.
        """
        watch = self._watch(path)
        if watch < 0:
            asyncio.get_running_loop().call_later(POLL_SECONDS, wake)
        else:
            self._waiting.setdefault(watch, set()).add(wake)

    def close(self) -> None:
        """Forget everybody."""
        self._waiting.clear()
        if self._fd >= 0 and self._loop is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _watch(self, path: Path) -> int:
        """Return the number of a watch that lives until one event; negative: there can be none."""
        if self._fd < 0:
            fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if fd < 0:
                return -1
            self._fd, self._loop = fd, asyncio.get_running_loop()
            self._loop.add_reader(fd, self._tell)
        # One event a look: a serial port is written to byte by byte.
        return int(_libc.inotify_add_watch(self._fd, os.fsencode(path), ctypes.c_uint32(_MODIFY | _ONESHOT)))

    def _tell(self) -> None:
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            watch, _, _, name = _HEADER.unpack_from(data, at)
            at += _HEADER.size + name
            # -1: events were lost, so anybody's may be among them.
            woken = [watch] if watch >= 0 else list(self._waiting)
            for one in woken:
                for wake in self._waiting.pop(one, ()):
                    wake()
