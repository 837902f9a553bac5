"""Header blocks: names and values, compressed by one zlib stream for each direction of a connection."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

from vmruntime.streaming.errors import ProtocolError
from vmruntime.streaming.spdy.dictionary import DICTIONARY

COUNT_LIMIT = 1000
"""Headers of one block that peers accept."""

FIELD_LIMIT = 1024 * 1024
"""Bytes of one name or value that peers accept."""

BLOCK_LIMIT = 2 * FIELD_LIMIT
"""Bytes of one block after decompression, so that a small one cannot fill the memory."""

_NUMBER = struct.Struct(">I")


class HeaderCompressor:
    """Writes header blocks; their order is the order in which they must be sent."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(zdict=DICTIONARY)

    def compress(self, headers: Mapping[str, str]) -> bytes:
        """Return a block. Names are written in lower case, as the protocol wants them."""
        block = bytearray(_NUMBER.pack(len(headers)))
        for name, value in headers.items():
            for text in (name.lower(), value):
                field = text.encode("latin-1", errors="replace")
                block += _NUMBER.pack(len(field)) + field
        return self._zlib.compress(bytes(block)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class HeaderDecompressor:
    """Reads header blocks in the order in which they came."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zdict=DICTIONARY)

    def decompress(self, block: bytes) -> dict[str, str]:
        """Return a block's headers, names in lower case; of several values of one name, the first.

        Raises:
            ProtocolError: It is malformed or exceeds a limit; the connection's later blocks cannot be read either.
        """
        try:
            plain = self._zlib.decompress(block, BLOCK_LIMIT + 1)
        except zlib.error as error:
            raise ProtocolError(f"a header block cannot be decompressed: {error}") from error
        if len(plain) > BLOCK_LIMIT or self._zlib.unconsumed_tail:
            raise ProtocolError(f"a header block has more than {BLOCK_LIMIT} bytes")
        if self._zlib.eof:
            raise ProtocolError("the stream of header blocks has ended")
        return _parse(plain)


def _parse(plain: bytes) -> dict[str, str]:
    count, at = _number(plain, 0)
    if count > COUNT_LIMIT:
        raise ProtocolError(f"a header block has {count} headers; at most {COUNT_LIMIT} are allowed")
    headers: dict[str, str] = {}
    for _ in range(count):
        name, at = _field(plain, at)
        value, at = _field(plain, at)
        if not name or name.lower() in headers:
            raise ProtocolError("a header has no name, or the name of another one")
        headers[name.lower()] = value.split("\0", 1)[0]
    if at != len(plain):
        raise ProtocolError("a header block has bytes after its last header")
    return headers


def _number(plain: bytes, at: int) -> tuple[int, int]:
    if at + _NUMBER.size > len(plain):
        raise ProtocolError("a header block ends too early")
    return _NUMBER.unpack_from(plain, at)[0], at + _NUMBER.size


def _field(plain: bytes, at: int) -> tuple[str, int]:
    length, at = _number(plain, at)
    if length > FIELD_LIMIT:
        raise ProtocolError(f"a header has a field of {length} bytes; at most {FIELD_LIMIT} are allowed")
    if at + length > len(plain):
        raise ProtocolError("a header block ends too early")
    return plain[at : at + length].decode("latin-1"), at + length
