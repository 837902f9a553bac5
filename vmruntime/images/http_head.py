"""What a server says of a file before it sends it: the header fields that matter for going on later (RFC 9110)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

_LIMIT = 1024 * 1024
_STATUS = re.compile(r"HTTP/[0-9.]+ +([0-9]{3})")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


@dataclasses.dataclass(frozen=True)
class Head:
    """The last answer of a transfer.

    Attributes:
        total: Bytes of the whole file; None: it does not say.
        start: Of a part: its first byte.
        validator: What If-Range takes: a strong entity tag, or a date; empty: none.
        ranges: Parts may be asked for, as far as is known.
    """

    status: int
    total: int | None = None
    start: int = 0
    validator: str = ""
    ranges: bool = True


def read(path: Path) -> Head | None:
    """Return the last of the heads in a file that curl wrote; None: there is none. Blocks."""
    try:
        with path.open("rb") as file:
            return parse(file.read(_LIMIT))
    except FileNotFoundError:
        return None


def parse(data: bytes) -> Head | None:
    """Return the last of the heads that curl wrote down; redirects and proxies have their own before it."""
    head: tuple[int, dict[str, str]] | None = None
    for line in data.decode("latin-1").splitlines():
        status = _STATUS.match(line)
        if status is not None:
            head = (int(status[1]), {})
        elif head is not None:
            name, colon, value = line.partition(":")
            if colon:
                head[1][name.strip().lower()] = value.strip()
    return None if head is None else _head(*head)


def _head(status: int, fields: dict[str, str]) -> Head:
    total: int | None = None
    start = 0
    length = fields.get("content-length", "")
    part = _RANGE.fullmatch(fields.get("content-range", ""))
    if status == 206 and part is not None:
        start = int(part[1])
        total = None if part[3] == "*" else int(part[3])
    elif status == 200 and re.fullmatch(r"[0-9]{1,18}", length) and "transfer-encoding" not in fields:
        total = int(length)
    ranges = fields.get("accept-ranges", "").lower() != "none" and "content-encoding" not in fields
    return Head(status, total, start, _validator(fields), ranges)


def _validator(fields: dict[str, str]) -> str:
    for value in (fields.get("etag", ""), fields.get("last-modified", "")):
        # A weak tag promises the same meaning, not the same bytes.
        if value and not value.startswith("W/") and value.isascii() and value.isprintable() and len(value) <= 1024:
            return value
    return ""
