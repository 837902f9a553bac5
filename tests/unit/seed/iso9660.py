"""A reader of ISO 9660 images that shares nothing with what writes them (ECMA-119; IEEE P1282 for Rock Ridge)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

SECTOR = 2048


@dataclasses.dataclass(frozen=True)
class Volume:
    """What one volume descriptor leads to: files by path, with their modes where Rock Ridge says them."""

    label: str
    sectors: int
    files: dict[str, bytes]
    modes: dict[str, int]


def volumes(image: bytes) -> tuple[Volume, Volume]:
    """Return the primary volume with the names of Rock Ridge, and Joliet's."""
    found: dict[int, bytes] = {}
    for number in range(16, len(image) // SECTOR):
        descriptor = image[number * SECTOR : (number + 1) * SECTOR]
        assert descriptor[1:7] == b"CD001\x01"
        if descriptor[0] == 255:
            break
        found[descriptor[0]] = descriptor
    joliet = found[2]
    assert joliet[88:91] == b"%/E", "escape sequence of Joliet level 3"
    return _volume(image, found[1], "ascii"), _volume(image, joliet, "utf-16-be")


def _volume(image: bytes, descriptor: bytes, encoding: str) -> Volume:
    files: dict[str, bytes] = {}
    modes: dict[str, int] = {}
    _walk(image, descriptor[156:190], "", encoding, files, modes)
    label = descriptor[40:72].decode(encoding).rstrip(" \0")
    return Volume(label, int.from_bytes(descriptor[80:84], "little"), files, modes)


def _walk(
    image: bytes, record: bytes, path: str, encoding: str, files: dict[str, bytes], modes: dict[str, int]
) -> None:
    for entry in _records(_extent(image, record)):
        raw = entry[33 : 33 + entry[32]]
        if raw in (b"\0", b"\1"):
            continue
        name = raw.decode(encoding).split(";")[0]
        if encoding == "ascii":
            name, mode = _rock_ridge(entry)
            modes[path + name] = mode
        if entry[25] & 2:
            _walk(image, entry, f"{path}{name}/", encoding, files, modes)
        else:
            files[path + name] = _extent(image, entry)


def _extent(image: bytes, record: bytes) -> bytes:
    start, length = int.from_bytes(record[2:6], "little") * SECTOR, int.from_bytes(record[10:14], "little")
    assert start + length <= len(image)
    return image[start : start + length]


def _records(directory: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(directory):
        length = directory[place]
        if length == 0:  # the rest of the sector is empty
            place += SECTOR - place % SECTOR
            continue
        yield directory[place : place + length]
        place += length


def _rock_ridge(record: bytes) -> tuple[str, int]:
    place = 33 + record[32] + (record[32] + 1) % 2
    name, mode = "", 0
    while place + 4 <= len(record) and record[place + 2] >= 4:
        signature, length = record[place : place + 2], record[place + 2]
        if signature == b"NM":
            name += record[place + 5 : place + length].decode()
        elif signature == b"PX":
            mode = int.from_bytes(record[place + 4 : place + 8], "little")
        place += length
    return name, mode
