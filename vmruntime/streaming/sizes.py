"""Terminal sizes as clients send them: JSON objects one after the other, {"Width": 80, "Height": 24}."""

from __future__ import annotations

import msgspec

from vmruntime.model.streams import TerminalSize

LIMIT = 4096
"""Bytes of one object."""


class _Size(msgspec.Struct):
    width: int = msgspec.field(name="Width", default=0)
    height: int = msgspec.field(name="Height", default=0)


class SizeDecoder:
    """Finds sizes in a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> list[TerminalSize]:
        """Return the sizes that are complete now; what is no size is skipped."""
        self._buffer += data
        found = []
        while (end := self._buffer.find(b"}")) >= 0:
            text = bytes(self._buffer[: end + 1])
            del self._buffer[: end + 1]
            try:
                size = msgspec.json.decode(text, type=_Size)
            except msgspec.DecodeError:
                continue
            if size.width > 0 and size.height > 0:
                found.append(TerminalSize(columns=size.width, rows=size.height))
        del self._buffer[:-LIMIT]
        return found


def encode_size(size: TerminalSize) -> bytes:
    """Return a size as a client sends it."""
    return msgspec.json.encode(_Size(width=size.columns, height=size.rows))
