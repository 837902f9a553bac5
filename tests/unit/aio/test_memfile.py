"""Memory as a file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from vmruntime.aio import memfile

PAGE = mmap.PAGESIZE
SIZE = 64 << 20


@pytest.fixture
def source() -> Iterator[int]:
    """A sparse file with data at its start, somewhere, and at its end."""
    fd = memfile.make("test", SIZE)
    os.pwrite(fd, b"first", 0)
    os.pwrite(fd, bytes(3 * PAGE) + b"x" * PAGE, 8 << 20)
    os.pwrite(fd, b"last", SIZE - 4)
    yield fd
    os.close(fd)


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512 // PAGE


def test_a_copy_has_what_there_is_and_takes_no_more(source: int) -> None:
    target = memfile.make("copy", SIZE)
    memfile.copy(source, target)
    assert blocks(target) == blocks(source) == 6
    assert os.pread(target, SIZE, 0) == os.pread(source, SIZE, 0)
    assert memfile.digest(target) == memfile.digest(source)
    os.close(target)


def test_zeros_become_holes(source: int) -> None:
    before = os.pread(source, SIZE, 0)
    memfile.drop_zeros(source)
    assert blocks(source) == 3
    assert os.pread(source, SIZE, 0) == before


def test_a_digest_is_of_content_and_place_and_not_of_holes(source: int) -> None:
    before = memfile.digest(source)
    os.pwrite(source, bytes(PAGE), 32 << 20)
    assert memfile.digest(source) == before
    other = memfile.make("moved", SIZE)
    memfile.copy(source, other)
    os.pwrite(other, os.pread(source, PAGE, 0), PAGE)
    os.pwrite(other, bytes(PAGE), 0)
    assert memfile.digest(other) != before
    os.close(other)


def test_what_is_sealed_stays_as_it_is(source: int) -> None:
    memfile.seal(source)
    with pytest.raises(PermissionError):
        os.pwrite(source, b"!", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(source, 0)
    again = os.open(f"/proc/self/fd/{source}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"!", 0)
    private = mmap.mmap(again, PAGE, flags=mmap.MAP_PRIVATE)
    private[:5] = b"other"
    assert os.pread(source, 5, 0) == b"first"
    private.close()
    os.close(again)
