"""Memory as a file (memfd_create(2)): it has no name in any directory, and is gone with its last descriptor. All of it blocks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator

CHUNK = 1024 * 1024
ZEROS = bytes(mmap.PAGESIZE)
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def make(name: str, size: int) -> int:
    """Return the descriptor of an empty memory file; it takes no memory until something is written.

    Args:
        name: What people see of it in /proc.
        size: Bytes.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Let nobody change a memory file any more, not even those who have it open (F_ADD_SEALS, fcntl(2)).

    Raises:
        OSError: Somebody has it mapped and may write.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def pieces(fd: int) -> Iterator[tuple[int, int]]:
    """Iterate over offset and length of what a sparse file has (SEEK_DATA, lseek(2)), in pieces of at most 1 MiB."""
    position = 0
    while True:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        for offset in range(start, position, CHUNK):
            yield offset, min(CHUNK, position - offset)


def copy(source: int, target: int) -> None:
    """Copy what a sparse file has to the same places of another one, which has its size and nothing there yet."""
    buffer = memoryview(bytearray(CHUNK))
    for offset, length in pieces(source):
        done = 0
        while done < length:
            part = buffer[: length - done]
            count = os.preadv(source, [part], offset + done)
            if count == 0:
                return  # it has become shorter
            _write(target, part[:count], offset + done)
            done += count


def digest(fd: int) -> str:
    """Return the SHA-256 of a file's pages and their places, as hexadecimal; what is zero does not count, nor how it is stored."""
    found = hashlib.sha256()
    for offset, page in _pages(fd):
        if page != ZEROS[: len(page)]:
            found.update(offset.to_bytes(8, "little"))
            found.update(page)
    return found.hexdigest()


def drop_zeros(fd: int) -> None:
    """Make holes of pages that are nothing but zeros."""
    for offset, page in _pages(fd):
        if page == ZEROS:
            _punch(fd, offset)


def _pages(fd: int) -> Iterator[tuple[int, memoryview]]:
    """Iterate over offset and content of the pages that a file has; the content is there until the next one is asked for."""
    buffer = memoryview(bytearray(CHUNK))
    for offset, length in pieces(fd):
        count = os.preadv(fd, [buffer[:length]], offset)
        for page in range(0, count, mmap.PAGESIZE):
            yield offset + page, buffer[page : min(page + mmap.PAGESIZE, count)]


def _punch(fd: int, offset: int) -> None:
    """Take one page out of a file."""
    # Python has no fallocate(2) with FALLOC_FL_PUNCH_HOLE; a mapping has the same effect (MADV_REMOVE, madvise(2)).
    with contextlib.closing(mmap.mmap(fd, mmap.PAGESIZE, offset=offset)) as mapping:
        mapping.madvise(mmap.MADV_REMOVE)


def _write(target: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(target, data, offset)
        data, offset = data[count:], offset + count
