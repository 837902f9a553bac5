"""Reading container logs in CRI's format.

A line of the file is `TIME STREAM TAG TEXT`: RFC 3339 time with nanoseconds, stdout or stderr, F for a line that is
complete or P for a piece whose rest follows, and the text as the container wrote it. Tags after the first, separated
by colons, are reserved by the format and ignored.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

CHUNK = 1024 * 1024


class Stream(enum.Enum):
    """Which of a container's outputs."""

    STDOUT = "stdout"
    STDERR = "stderr"


class MalformedLine(ValueError):
    """Raised when a line is not in CRI's log format."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a log file.

    Attributes:
        time: As written, RFC 3339.
        partial: The container's line goes on in a later entry of the same stream.
        text: Without the line end.
    """

    time: str
    stream: Stream
    partial: bool
    text: bytes


def parse_line(line: bytes) -> Entry:
    """Return what one line, without its line end, says.

    Raises:
        MalformedLine: It is not in CRI's format.
    """
    fields = line.split(b" ", 3)
    # A line that ends after its tag is an empty line whose writer dropped the separator.
    if len(fields) == 3:
        fields.append(b"")
    if len(fields) != 4:
        raise MalformedLine(f"{len(fields)} fields")
    time, stream, tags, text = fields
    if not time or not time.isascii():
        raise MalformedLine("no time")
    try:
        which = Stream(stream.decode("ascii"))
    except ValueError:
        raise MalformedLine("neither stdout nor stderr") from None
    tag = tags.split(b":", 1)[0]
    if tag not in (b"F", b"P"):
        raise MalformedLine("neither F nor P")
    return Entry(time=time.decode("ascii"), stream=which, partial=tag == b"P", text=text)


class LogFile:
    """A container's log file, read as it grows.

    Survives rotation: when the path names another file, the old one is read to its end first. Missing files are
    waited for.

    Attributes:
        malformed: How many lines were skipped because they are not in CRI's format.
    """

    def __init__(self, path: Path) -> None:
        self.malformed = 0
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self) -> list[Entry]:
        """Return the entries that were written since the last call, a chunk at most; empty: none for now."""
        entries = self._read_more()
        if entries or not self._moved_on():
            return entries
        # The path leads to a new file, so nobody writes to the old one any more: what is in it now is its end.
        entries = self._read_more()
        if not entries:
            self.close()
            self._rest = b""
            entries = self._read_more()
        return entries

    def _read_more(self) -> list[Entry]:
        if self._file is None:
            try:
                self._file = self._path.open("rb", buffering=0)
            except FileNotFoundError:
                return []
        data = self._file.read(CHUNK)
        while data:
            *lines, self._rest = (self._rest + data).split(b"\n")
            entries = list(self._parse(lines))
            if entries:
                return entries
            data = self._file.read(CHUNK)
        return []

    def _parse(self, lines: Iterable[bytes]) -> Iterator[Entry]:
        for line in lines:
            try:
                yield parse_line(line)
            except MalformedLine:
                self.malformed += 1

    def _moved_on(self) -> bool:
        if self._file is None:
            return False
        now = os.fstat(self._file.fileno())
        if now.st_size < self._file.tell():
            # Cut short in place (copytruncate): what was read is gone, what comes is new.
            self._file.seek(0, io.SEEK_SET)
            self._rest = b""
            return False
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) != (now.st_dev, now.st_ino)


class Printer:
    """Writes entries as the container wrote them: pieces joined, stdout to one place, stderr to another."""

    def __init__(self, stdout: BinaryIO, stderr: BinaryIO, *, timestamps: bool = False) -> None:
        self._outputs = {Stream.STDOUT: stdout, Stream.STDERR: stderr}
        self._timestamps = timestamps
        self._inside: set[Stream] = set()

    def write(self, entries: Iterable[Entry]) -> None:
        """Write entries and flush; a piece goes out at once, without waiting for its rest."""
        used: set[Stream] = set()
        for entry in entries:
            used.add(entry.stream)
            output = self._outputs[entry.stream]
            if self._timestamps and entry.stream not in self._inside:
                output.write(entry.time.encode() + b" ")
            output.write(entry.text if entry.partial else entry.text + b"\n")
            if entry.partial:
                self._inside.add(entry.stream)
            else:
                self._inside.discard(entry.stream)
        for stream in used:
            self._outputs[stream].flush()


def last_lines(entries: Iterable[Entry], count: int) -> list[Entry]:
    """Return the entries of the last `count` lines; the pieces of a line count once."""
    if count <= 0:
        collections.deque(entries, maxlen=0)
        return []
    kept: collections.deque[list[tuple[int, Entry]]] = collections.deque(maxlen=count)
    unfinished: dict[Stream, list[tuple[int, Entry]]] = {}
    for order, entry in enumerate(entries):
        line = unfinished.pop(entry.stream, None)
        if line is None:
            line = []
            kept.append(line)
        line.append((order, entry))
        if entry.partial:
            unfinished[entry.stream] = line
    # Lines of the two streams may be interleaved piece by piece.
    return [entry for _, entry in sorted(chain.from_iterable(kept), key=lambda pair: pair[0])]
