"""Frames on the wire (SPDY Protocol draft 3.1, section 2.2).

control  1 | version 15 | type 16 | flags 8 | length 24 | payload
data     0 | stream id 31         | flags 8 | length 24 | payload
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterator

from vmruntime.streaming.errors import ProtocolError

VERSION = 3
STREAM_ID_LIMIT = 0x7FFFFFFF
FLAG_FIN = 0x01
CONTROL_LIMIT = 1024 * 1024
"""Bytes of a control frame's payload that are accepted: it is kept until it is complete. Data is never kept."""

_HEAD = struct.Struct(">II")


class FrameType(enum.IntEnum):
    """Control frames that are understood; others are skipped, as the protocol says."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    PING = 6
    GOAWAY = 7
    HEADERS = 8


_SIZES = {FrameType.RST_STREAM: 8, FrameType.PING: 4, FrameType.GOAWAY: 8}
_MINIMUM = {FrameType.SYN_STREAM: 10, FrameType.SYN_REPLY: 4, FrameType.HEADERS: 4}


@dataclasses.dataclass(frozen=True)
class ControlFrame:
    """One whole control frame."""

    kind: FrameType
    flags: int
    payload: bytes


@dataclasses.dataclass(frozen=True)
class DataPiece:
    """A part of a data frame; `fin` only with the last part of a stream's last frame."""

    stream_id: int
    data: bytes
    fin: bool


def control(kind: FrameType, payload: bytes, *, flags: int = 0) -> bytes:
    """Return a control frame's bytes."""
    return _HEAD.pack(0x80000000 | VERSION << 16 | kind, flags << 24 | len(payload)) + payload


def data(stream_id: int, payload: bytes, *, fin: bool = False) -> bytes:
    """Return a data frame's bytes; the payload has less than 2^24."""
    return _HEAD.pack(stream_id, (FLAG_FIN if fin else 0) << 24 | len(payload)) + payload


class FrameParser:
    """Cuts a stream of bytes, arriving in any pieces, into frames. It keeps at most one control frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._stream_id = 0
        self._fin = False
        self._data_left = 0
        self._skip_left = 0

    def receive(self, chunk: bytes) -> Iterator[ControlFrame | DataPiece]:
        """Iterate over what `chunk` completes; use up the iterator before the next chunk.

        Raises:
            ProtocolError: The bytes are no SPDY/3.1; nothing can be read after them.
        """
        self._buffer += chunk
        while True:
            if self._skip_left:
                self._skip_left -= len(self._take(self._skip_left))
                if self._skip_left:
                    return
            elif self._data_left:
                if not self._buffer:
                    return
                yield self._piece()
            elif len(self._buffer) < _HEAD.size:
                return
            else:
                first, second = _HEAD.unpack_from(self._buffer)
                if not first & 0x80000000:
                    yield from self._begin_data(first, second >> 24, second & 0xFFFFFF)
                else:
                    frame = self._control(first, second >> 24, second & 0xFFFFFF)
                    if frame is None:
                        return
                    yield from frame

    def _take(self, limit: int) -> bytes:
        taken = bytes(self._buffer[:limit])
        del self._buffer[:limit]
        return taken

    def _piece(self) -> DataPiece:
        taken = self._take(self._data_left)
        self._data_left -= len(taken)
        return DataPiece(self._stream_id, taken, self._fin and not self._data_left)

    def _begin_data(self, stream_id: int, flags: int, length: int) -> Iterator[DataPiece]:
        if stream_id == 0:
            raise ProtocolError("a data frame is of stream 0")
        self._take(_HEAD.size)
        self._stream_id, self._fin, self._data_left = stream_id, bool(flags & FLAG_FIN), length
        if length == 0:
            yield DataPiece(stream_id, b"", self._fin)

    def _control(self, first: int, flags: int, length: int) -> Iterator[ControlFrame] | None:
        """Return what to yield, or None when the frame is not complete yet."""
        version, number = first >> 16 & 0x7FFF, first & 0xFFFF
        if version != VERSION:
            raise ProtocolError(f"a frame is of SPDY version {version}, not {VERSION}")
        try:
            kind = FrameType(number)
        except ValueError:
            self._take(_HEAD.size)
            self._skip_left = length
            return iter(())
        if length > CONTROL_LIMIT:
            raise ProtocolError(f"a {kind.name} frame has {length} bytes; at most {CONTROL_LIMIT} are accepted")
        if length != _SIZES.get(kind, length) or length < _MINIMUM.get(kind, 0):
            raise ProtocolError(f"a {kind.name} frame has {length} bytes")
        if len(self._buffer) < _HEAD.size + length:
            return None
        self._take(_HEAD.size)
        return iter((ControlFrame(kind, flags, self._take(length)),))
