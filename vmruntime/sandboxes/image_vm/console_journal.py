"""How a console's bytes became records, written down before anybody gets to see them.

The bytes alone do not say it: when a line was seen, that "login: " was given out because nothing followed, that output
was dropped. A record has to render to the same bytes when a later daemon makes it again (ADR 0002), so the later one
repeats what is written here, and decides anew only behind the last entry.
"""

from __future__ import annotations

import bisect
import contextlib
import enum
import os
import struct
from pathlib import Path
from typing import NamedTuple

_ENTRY = struct.Struct("<QQ")

COMPACT = 1024
"""Entries that are worth forgetting."""


class Kind(enum.IntEnum):
    """What happened at an offset."""

    SEEN = 0
    """Everything before it was cut where lines end and where they are too long."""

    CUT = 1
    """The line it is in was given out up to there."""

    DROP = 2
    """What is before it and was not given out was thrown away."""

    END = 3
    """The machine had ended: there is no more."""


class Entry(NamedTuple):
    """One of them; offsets grow from entry to entry. The time is in nanoseconds since the epoch."""

    kind: Kind
    offset: int
    time_ns: int


class Journal:
    """A file of entries. Its methods block on the disk.

    Each entry is one small write, of which a killed process leaves all or nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _load(path)
        self._first = 0  # the number of the first entry

    @property
    def last(self) -> Entry | None:
        """The latest entry."""
        return self._entries[-1] if self._entries else None

    @property
    def next(self) -> int:
        """The number the next entry gets."""
        return self._first + len(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, number: int) -> Entry | None:
        """Return an entry; None: there is none yet."""
        index = number - self._first
        return self._entries[index] if 0 <= index < len(self._entries) else None

    def behind(self, offset: int) -> int:
        """Return the number of the first entry behind an offset."""
        return self._first + _up_to(self._entries, offset)

    def append(self, entry: Entry) -> None:
        """Write an entry down."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, _packed(entry))
        finally:
            os.close(fd)
        self._entries.append(entry)

    def amend(self, entry: Entry) -> None:
        """Write an entry in place of the last one, which nobody has followed yet."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, _packed(entry), os.fstat(fd).st_size - _ENTRY.size)
        finally:
            os.close(fd)
        self._entries[-1] = entry

    def forget(self, offset: int) -> None:
        """Let go of entries up to an offset, once there are so many that it is worth it; the last one stays."""
        old = min(_up_to(self._entries, offset), len(self._entries) - 1)
        if old < COMPACT:
            return
        kept = self._entries[old:]
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_bytes(b"".join(map(_packed, kept)))
        new.replace(self._path)
        self._entries = kept
        self._first += old

    def remove(self) -> None:
        """Remove the file."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def _up_to(entries: list[Entry], offset: int) -> int:
    return bisect.bisect_right(entries, offset, key=lambda entry: entry.offset)


def _packed(entry: Entry) -> bytes:
    return _ENTRY.pack(entry.offset << 2 | entry.kind, entry.time_ns)


def _load(path: Path) -> list[Entry]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = len(data) - len(data) % _ENTRY.size
    if whole < len(data):
        os.truncate(path, whole)
    return [Entry(Kind(word & 3), word >> 2, time_ns) for word, time_ns in _ENTRY.iter_unpack(data[:whole])]
