"""Sparse files in a tar: which parts of them the archive has. GNU tar's four ways to say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmruntime.images.unpacker.fields import decimal, number
from vmruntime.images.unpacker.problems import BadLayer

Segments = list[tuple[int, int]]
"""Offset and length of what is no hole, in order."""

_BLOCK = 512
# Of 24 bytes each, at least, in the archive's oldest form; more than any file has that is worth it.
SEGMENTS_LIMIT = 2**18


def of_header(block: bytes, more: Callable[[], bytes]) -> tuple[Segments, int]:
    """Read the map of a member of type S, and the file's size with holes.

    Args:
        block: The header.
        more: Returns the next block of the archive.

    Raises:
        BadLayer: See check().
    """
    size = number(block[483:495], "size")
    segments = _entries(block[386:482])
    extended = block[482]
    while extended:
        block = more()
        segments += _entries(block[:504])
        _limit(len(segments))
        extended = block[504]
    return segments, size


def _entries(table: bytes) -> Segments:
    pairs = ((table[at : at + 12], table[at + 12 : at + 24]) for at in range(0, len(table), 24))
    return [(number(offset, "offset"), number(length, "length")) for offset, length in pairs if offset[0] or length[0]]


def of_record(text: bytes) -> Segments:
    """Read the record GNU.sparse.map: "offset,length,…".

    Raises:
        BadLayer: There are no pairs of numbers.
    """
    numbers = text.split(b",") if text else []
    _limit(len(numbers) // 2)
    return _pairs([decimal(one, "sparse map") for one in numbers])


def of_content(read: Callable[[], bytes]) -> Segments:
    """Read the map before a member's content: lines with the number of segments, and offset and length of each.

    Args:
        read: Returns the next block of the member.

    Raises:
        BadLayer: See check().
    """
    text = b""
    lines: list[bytes] = []
    wanted = 1
    while len(lines) < wanted:
        while b"\n" not in text:
            if len(text) > 20:
                raise BadLayer("is corrupt: its tar has a sparse file without a map")
            text += read()
        *whole, text = text.split(b"\n")
        lines += whole
        count = decimal(lines[0], "sparse map")
        _limit(count)
        wanted = 1 + 2 * count
    return _pairs([decimal(line, "sparse map") for line in lines[1:wanted]])


def check(segments: Segments, size: int, stored: int) -> None:
    """Check that the segments are in order and within the file, and that the archive has all of their bytes.

    Raises:
        BadLayer: They are not, or it has not.
    """
    at = 0
    for offset, length in segments:
        if offset < at or offset + length > size:
            raise BadLayer("is corrupt: its tar has a sparse file whose parts are not within it, one after the other")
        at = offset + length
    if sum(length for _, length in segments) != stored:
        raise BadLayer("is corrupt: its tar has a sparse file whose parts are not as long as its content")


def expand(segments: Segments, size: int, pieces: Callable[[int], Iterator[memoryview]]) -> Iterator[memoryview | int]:
    """Yield a file's bytes, and the lengths of its holes.

    Args:
        segments: As check() takes them.
        size: Holes included.
        pieces: Yields so many bytes of what the archive has.
    """
    at = 0
    for offset, length in segments:
        if offset > at:
            yield offset - at
        yield from pieces(length)
        at = offset + length
    if size > at:
        yield size - at


def _pairs(numbers: list[int]) -> Segments:
    if len(numbers) % 2:
        raise BadLayer("is corrupt: its tar has a sparse file with half a pair in its map")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _limit(count: int) -> None:
    if count > SEGMENTS_LIMIT:
        raise BadLayer(f"cannot be unpacked: its tar has a sparse file of more than {SEGMENTS_LIMIT} parts")
