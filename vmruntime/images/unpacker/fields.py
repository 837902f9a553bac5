"""What is in the fields and extended records of a tar's headers."""

from __future__ import annotations

import re

from vmruntime.images.unpacker.problems import BadLayer, shown

_TIME = re.compile(rb"(-?)(\d{1,18})(?:\.(\d*))?")
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def check(block: bytes, field: bytes) -> None:
    """Check a header's sum.

    Raises:
        BadLayer: It is wrong: this is no header.
    """
    told = number(field, "checksum")
    rest = block[:148] + b" " * 8 + block[156:]
    # Some of the first tars added up signed characters.
    if told != sum(rest) and told != sum(byte - 256 if byte > 127 else byte for byte in rest):
        raise BadLayer("is corrupt: its tar has a header whose checksum is wrong")


def number(field: bytes, name: str, *, signed: bool = False) -> int:
    """Return a numeric field: octal digits, or GNU's binary form for what does not fit.

    Raises:
        BadLayer: It is neither, or negative and must not be.
    """
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        if value >> (bits - 1):
            value -= 1 << bits
        return in_range(value, name, signed=signed)
    digits = field.strip(b" \0")
    if digits.isdigit() and b"8" not in digits and b"9" not in digits:
        return int(digits, 8)
    if digits:
        raise BadLayer(f"is corrupt: its tar has a header with the {name} {shown(field)}")
    return 0


def decimal(text: bytes, name: str) -> int:
    """Return a number of an extended record.

    Raises:
        BadLayer: It is none, or out of range.
    """
    if not text.isdigit() or len(text) > 20:
        raise BadLayer(f"is corrupt: its tar has the {name} {shown(text)}")
    return in_range(int(text), name)


def in_range(value: int, name: str, *, signed: bool = False) -> int:
    """Return a number that a file can have.

    Raises:
        BadLayer: It is not.
    """
    if not (-(2**62) if signed else 0) <= value < 2**62:
        raise BadLayer(f"cannot be unpacked: its tar has a member with the {name} {value}")
    return value


def time(text: bytes) -> tuple[int, int]:
    """Return the seconds of an extended record's time, and the nanoseconds to add.

    Raises:
        BadLayer: It is no time.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise BadLayer(f"is corrupt: its tar has the time {shown(text)}")
    seconds, fraction = int(match[2]), int(((match[3] or b"") + b"0" * 9)[:9])
    if not match[1]:
        return seconds, fraction
    return (-seconds - 1, 10**9 - fraction) if fraction else (-seconds, 0)


def text(field: bytes) -> bytes:
    """Return a field up to its end or the first NUL."""
    return field.partition(b"\0")[0]


def records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of an extended header (pax): "LENGTH KEY=VALUE" and a line feed each.

    Those of GNU's first form for sparse files, which has the same two keys again and again, become the one of its second.

    Raises:
        BadLayer: They are none.
    """
    found: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        digits = data[at : max(space, at)]
        end = at + int(digits) if digits.isdigit() else at
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not at < space < end <= len(data) or data[end - 1] != ord("\n") or not (key and equals):
            raise BadLayer(f"is corrupt: its tar has the extended record {shown(data[at : at + 100])}")
        if key in _SPARSE_PAIR:
            pairs.append(value)
        else:
            found[key] = value
        at = end
    if pairs:
        found[b"GNU.sparse.map"] = b",".join(pairs)
    return found
