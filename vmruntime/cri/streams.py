"""Lists in pieces, for the streaming forms of the list calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

# Well below the 16 MiB a message may have, and enough for one message on nearly every node.
_PIECE_BYTES = 1024 * 1024


def pieces(items: Iterable[M]) -> Iterator[list[M]]:
    """Cut a list into pieces of about 1 MiB, none of them empty; every item is in exactly one."""
    piece: list[M] = []
    size = 0
    for item in items:
        length = item.ByteSize()
        if piece and size + length > _PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(item)
        size += length
    if piece:
        yield piece
