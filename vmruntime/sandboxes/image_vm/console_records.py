"""The file a machine's serial console is written to, and the records made of it. All of this blocks on the disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vmruntime.clock import Clock
from vmruntime.model.output import OutputRecord
from vmruntime.sandboxes.image_vm.console_cutter import Cutter, Piece
from vmruntime.sandboxes.image_vm.console_journal import COMPACT, Entry, Journal, Kind

BLOCK = 64 * 1024
"""The unit in which disk is given back."""

TAIL_BYTES = 256 * 1024
"""What stays of the file's end in any case: error messages quote it."""

BACKLOG_LIMIT = 64 * 1024 * 1024
"""Bytes of output that may wait for a reader; then the older half is dropped."""

CHUNK = 64 * 1024

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class ConsoleFile:
    """What one run of a machine wrote to the console's file: from an offset on, to the machine's end.

    Attributes:
        journal: How the records came about.
    """

    def __init__(self, path: Path, start: int, clock: Clock) -> None:
        self.path = path
        self.start = start
        self.clock = clock
        self.journal = Journal(path.with_name(f"{path.name}.{start}.seen"))
        self._freed = start
        self._droppable: int | None = None  # the number of a DROP that no reader has followed yet

    @property
    def ended(self) -> bool:
        """Whether the machine has ended."""
        last = self.journal.last
        return last is not None and last.kind is Kind.END

    def end(self) -> int:
        """Note that the machine has ended; return the file's size, where the next run begins."""
        last = self.journal.last
        if last is None or last.kind is not Kind.END:
            last = Entry(Kind.END, max(self.size(), self._given), self.clock.now_ns())
            self.journal.append(last)
        return last.offset

    def size(self) -> int:
        """Return the file's size; before it is there: where this run begins."""
        try:
            return self.path.lstat().st_size
        except FileNotFoundError:
            return self.start

    def read(self, offset: int, length: int) -> bytes:
        """Return at most so many bytes; fewer at the end of what there is."""
        with self._opened(os.O_RDONLY) as fd:
            return os.pread(fd, length, offset)

    def worth_freeing(self, offset: int) -> bool:
        """Whether free() would do something."""
        return offset - self._freed >= 2 * BLOCK or len(self.journal) >= 2 * COMPACT

    def free(self, offset: int) -> None:
        """Give back the disk of what is before an offset, and forget how it came about, as far as that is worth it."""
        self.journal.forget(offset)
        if offset - self._freed >= 2 * BLOCK:
            with contextlib.suppress(FileNotFoundError):
                self._punch(self._freed, min(offset, self.size() - TAIL_BYTES))

    def bound(self) -> bool:
        """Drop the older half of what waits for a reader, when it is too much; return whether it was."""
        size = self.size()
        if self.ended or size - self._given <= BACKLOG_LIMIT:
            return False
        kept_from = (size - BACKLOG_LIMIT // 2) // BLOCK * BLOCK
        before = self._given
        drop = Entry(Kind.DROP, kept_from, self.clock.now_ns())
        if self._droppable is not None and self._droppable == self.journal.next - 1:
            self.journal.amend(drop)
        else:
            self._droppable = self.journal.next
            self.journal.append(drop)
        self._punch(before, kept_from)
        return True

    def followed(self, number: int) -> None:
        """Take note that a reader goes by an entry, which therefore cannot change any more."""
        if self._droppable == number:
            self._droppable = None

    @property
    def _given(self) -> int:
        """The offset behind all that was given out or dropped."""
        return self.journal.last.offset if self.journal.last is not None else self.start

    def _punch(self, start: int, end: int) -> None:
        """Make a hole of the whole blocks between two offsets; where the file system has no holes: nothing."""
        start, end = -(-start // BLOCK) * BLOCK, end // BLOCK * BLOCK
        if end <= start:
            return
        with self._opened(os.O_WRONLY) as fd:
            if _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, start, end - start) != 0:
                number = ctypes.get_errno()
                if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise OSError(number, os.strerror(number), str(self.path))
        self._freed = max(self._freed, end)

    @contextlib.contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        # The hypervisor's user owns the file; what is there instead is not to be followed, nor waited for.
        fd = os.open(self.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file", str(self.path))
            yield fd
        finally:
            os.close(fd)


class Records:
    """The records behind an offset, which is the end of a record or where the run begins.

    They depend on the file, the journal and the offset only, as far as the journal goes.

    Attributes:
        file: What they are read from.
        ended: There are no more.
        drained: All that the file holds was read.
    """

    def __init__(self, file: ConsoleFile, after: int) -> None:
        self.file = file
        self._cutter = Cutter(max(after, file.start))
        self._given = self._cutter.at
        self._number = file.journal.behind(self._given)
        if file.ended:  # also for who knows all that there is
            self._number = min(self._number, file.journal.next - 1)
        self.ended = False
        self.drained = False

    @property
    def holds_text(self) -> bool:
        """Whether the beginning of a line waits for its end."""
        return self._cutter.shown > self._cutter.at

    def step(self) -> list[OutputRecord]:
        """Read on; return the records that this completes, which may be none.

        Raises:
            OSError: The file cannot be read, or the journal not be written.
        """
        entry = self.file.journal.entry(self._number)
        if entry is None:
            return self._go_on()
        self.drained = False
        if entry.kind is Kind.DROP:
            self.file.followed(self._number)
            self._number += 1
            lost, self._cutter = entry.offset - self._given, Cutter(entry.offset)
            return self._records(
                [Piece(entry.offset, False, b"[%d bytes of console output were dropped]" % lost)], entry.time_ns
            )
        return self._records(self._repeat(entry), entry.time_ns)

    def cut(self) -> None:
        """Decide that the line that is held goes out as it is; step() gives it out. Other news comes first."""
        if self.file.journal.next == self._number and self.holds_text:
            self.file.journal.append(Entry(Kind.CUT, self._cutter.shown, self.file.clock.now_ns()))

    def _go_on(self) -> list[OutputRecord]:
        """Cut what is new in the file."""
        size, reached = self.file.size(), self._cutter.reached
        if size < reached:
            raise OSError(errno.EINVAL, f"it has {size} bytes, fewer than were read", str(self.file.path))
        data = self.file.read(reached, CHUNK) if size > reached else b""
        self.drained = reached + len(data) >= size
        pieces = self._cutter.feed(data)
        if not pieces:
            return []
        now = self.file.clock.now_ns()
        self.file.journal.append(Entry(Kind.SEEN, pieces[-1].end, now))
        self._number += 1
        return self._records(pieces, now)

    def _repeat(self, entry: Entry) -> list[Piece]:
        """Cut as it was cut before."""
        pieces = []
        if (left := entry.offset - self._cutter.reached) > 0:
            data = self.file.read(self._cutter.reached, min(left, CHUNK))
            if not data:
                raise OSError(errno.EINVAL, f"it ends before the byte {entry.offset}", str(self.file.path))
            pieces = self._cutter.feed(data)
        if self._cutter.reached >= entry.offset:
            self._number += 1
            self.ended = entry.kind is Kind.END
            last = self._cutter.finish() if self.ended else self._cutter.cut(entry.offset)
            pieces += [last] if last is not None else []
        return pieces

    def _records(self, pieces: list[Piece], time_ns: int) -> list[OutputRecord]:
        if pieces:
            self._given = pieces[-1].end
        return [OutputRecord(piece.end, False, time_ns, piece.partial, piece.data) for piece in pieces]
