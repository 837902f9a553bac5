"""A container's log file, written once whatever happens to the daemon.

The agent keeps every record until it is acknowledged, and a record is acknowledged only after its line is in the
file and the file's position is noted (in a small file of the daemon's own). A daemon that is killed in between
finds, when it is started again, a log that is longer than the noted position: the surplus is what it had written
but not noted. It asks the agent for the records after the noted one, and since a record always renders to the same
bytes, it leaves out as many bytes as the surplus is long, even in the middle of a line. kubelet may have renamed
the file meanwhile (rotation), so the file is known by its inode.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vmruntime.errors import FailedPrecondition, ResourceExhausted
from vmruntime.logs.format import render
from vmruntime.model.output import OutputRecord

POSITION = struct.Struct("<QQQQ")


class Position(msgspec.Struct, frozen=True):
    """Up to where a log is known to be written: record number, and bytes in the file of that inode."""

    seq: int
    offset: int
    device: int
    inode: int


class LogWriter:
    """Appends records to a log file. Its methods block on the disk: call them outside the event loop."""

    def __init__(self, path: Path | None, position_file: Path) -> None:
        self._path = path
        self._position_file = position_file
        self._fd = -1
        self._old_fd = -1  # a rotated file that still lacks the end of a torn line
        self._skip = 0
        self._seq = 0

    @property
    def seq(self) -> int:
        """Number of the last record that is safe: where reading is to go on."""
        return self._seq

    def open(self) -> None:
        """Open the log, or find the place where an earlier daemon stopped.

        Raises:
            FailedPrecondition: The path cannot be opened, or is not a regular file.
            ResourceExhausted: There is no room to note the position.
        """
        position = _load(self._position_file)
        if position is not None:
            self._seq = position.seq
            self._find_surplus(position)
        try:
            self._open_path()
            if self._skip == 0:
                self._note()
        except BaseException:
            self.close()
            raise

    def write(self, records: Sequence[OutputRecord]) -> None:
        """Append records, in order, and note the position; afterwards they may be acknowledged.

        Raises:
            ResourceExhausted: The log's disk is full; nothing is lost, the same records may be written again.
        """
        if not records:
            return
        surplus = self._skip
        lines = b"".join(self._without_surplus(render(record)) for record in records)
        if self._fd >= 0 and lines:
            try:
                self._append(lines)
            except ResourceExhausted:
                self._skip = surplus
                raise
        self._seq = records[-1].seq
        self._note()

    def reopen(self) -> None:
        """Let go of the file and open the path again; the next record goes there."""
        self._close_fd()
        self._open_path()
        self._note()

    def close(self) -> None:
        """Close the files; the position stays for a later daemon."""
        self._close_fd()
        if self._old_fd >= 0:
            os.close(self._old_fd)
            self._old_fd = -1

    def _append(self, lines: bytes) -> None:
        start = os.fstat(self._fd).st_size
        view = memoryview(lines)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            # Take back half a batch, so that writing it again does not double a line.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, start)
            raise ResourceExhausted(f"the log {self._path} cannot be written: {error.strerror}") from error

    def _without_surplus(self, line: bytes) -> bytes:
        """Return the part of a line that an earlier daemon had not written yet."""
        if self._skip == 0:
            return line
        if self._skip >= len(line):
            self._skip -= len(line)
            rest = b""
        else:
            rest, self._skip = line[self._skip :], 0
        if self._old_fd >= 0:
            # The torn line began in the rotated file and ends there.
            if rest:
                os.write(self._old_fd, rest)
            if self._skip == 0:
                os.close(self._old_fd)
                self._old_fd = -1
            return b""
        return rest

    def _find_surplus(self, position: Position) -> None:
        if self._path is None:
            return
        found = _find_inode(self._path, position)
        if found is None:
            return
        self._skip = max(0, found.stat().st_size - position.offset)
        if self._skip and found != self._path:
            self._old_fd = os.open(found, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)

    def _open_path(self) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(self._path, flags, 0o640)
        except OSError as error:
            raise FailedPrecondition(f"log_path: {self._path} cannot be opened: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FailedPrecondition(f"log_path: {self._path} is not a regular file")
        self._fd = fd

    def _note(self) -> None:
        """Write down the position; one small pwrite, which a killed process does not leave half done."""
        if self._skip:
            return  # the file still holds more than the noted records: the old note is the right one
        status = os.fstat(self._fd) if self._fd >= 0 else None
        offset, device, inode = (status.st_size, status.st_dev, status.st_ino) if status else (0, 0, 0)
        try:
            fd = os.open(self._position_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, POSITION.pack(self._seq, offset, device, inode), 0)
            finally:
                os.close(fd)
        except OSError as error:
            raise ResourceExhausted(f"{self._position_file} cannot be written: {error.strerror}") from error

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _load(position_file: Path) -> Position | None:
    try:
        data = position_file.read_bytes()
    except FileNotFoundError:
        return None
    return Position(*POSITION.unpack(data)) if len(data) == POSITION.size else None


def _find_inode(path: Path, position: Position) -> Path | None:
    """Return where the file of a position is now: at its path, or beside it under a rotated name."""
    candidates = [path]
    with contextlib.suppress(FileNotFoundError):
        candidates += sorted(path.parent.glob(f"{path.name}.*"))
    for candidate in candidates:
        try:
            status = candidate.lstat()
        except FileNotFoundError:
            continue
        if (status.st_dev, status.st_ino) == (position.device, position.inode) and stat.S_ISREG(status.st_mode):
            return candidate
    return None
