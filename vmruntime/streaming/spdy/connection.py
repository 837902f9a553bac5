"""The state of one connection: which streams are open, and what the frames mean.

stream   opened ──our last data──► half closed (local) ──their last data──► gone
└─────their last data──► half closed (remote) ──our last data──┘
RST_STREAM of either side ends it from any state.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterator, Mapping

from vmruntime.streaming.errors import ProtocolError
from vmruntime.streaming.spdy import frames
from vmruntime.streaming.spdy.frames import FLAG_FIN, STREAM_ID_LIMIT, ControlFrame, DataPiece, FrameParser, FrameType
from vmruntime.streaming.spdy.headers import HeaderCompressor, HeaderDecompressor

_UNIDIRECTIONAL = 0x02
_PAIR = struct.Struct(">II")
_SYN_STREAM = struct.Struct(">IIBB")
_ONE = struct.Struct(">I")

DATA_LIMIT = 32 * 1024
"""Bytes of the data frames that are sent: small, so that streams take turns."""


class ResetStatus(enum.IntEnum):
    """Why a stream is reset (section 2.6.3)."""

    PROTOCOL_ERROR = 1
    REFUSED_STREAM = 3
    CANCEL = 5


@dataclasses.dataclass(frozen=True)
class StreamOpened:
    """The peer opened a stream; answer with reply() or reset()."""

    stream_id: int
    headers: dict[str, str]
    fin: bool


@dataclasses.dataclass(frozen=True)
class StreamReplied:
    """The peer accepted our stream."""

    stream_id: int
    fin: bool


@dataclasses.dataclass(frozen=True)
class DataReceived:
    """Bytes of a stream, and whether they are its last."""

    stream_id: int
    data: bytes
    fin: bool


@dataclasses.dataclass(frozen=True)
class StreamReset:
    """The peer ended a stream; nothing more is sent or received on it."""

    stream_id: int
    status: int


@dataclasses.dataclass(frozen=True)
class GoAway:
    """The peer opens no more streams and wants the connection closed."""


Event = StreamOpened | StreamReplied | DataReceived | StreamReset | GoAway


@dataclasses.dataclass
class _Stream:
    remote_done: bool = False
    local_done: bool = False


class Connection:
    """One end of a connection, without I/O: bytes in, events and bytes out.

    Header blocks must be sent in the order in which they were made: send what a method returns before calling another.
    """

    def __init__(self, *, client: bool, stream_limit: int) -> None:
        """Begin.

        Args:
            client: Which end this is; the client's stream ids and pings are odd.
            stream_limit: Streams the peer may have open at once; more are refused.
        """
        self._client = client
        self._limit = stream_limit
        self._parser = FrameParser()
        self._compressor = HeaderCompressor()
        self._decompressor = HeaderDecompressor()
        self._streams: dict[int, _Stream] = {}
        self._next_id = 1 if client else 2
        self._last_peer_id = 0
        self._going = False
        self._answers = bytearray()

    def receive(self, chunk: bytes) -> Iterator[Event]:
        """Iterate over what happened; use up the iterator, then send answers().

        Raises:
            ProtocolError: The peer broke the protocol; close the connection.
        """
        for frame in self._parser.receive(chunk):
            event = self._data(frame) if isinstance(frame, DataPiece) else self._control(frame)
            if event is not None:
                yield event

    def answers(self) -> bytes:
        """Return, once, what the protocol itself answers: pings, refusals."""
        answers = bytes(self._answers)
        self._answers.clear()
        return answers

    def open(self, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Open a stream; return its id and the bytes to send."""
        stream_id = self._next_id
        if stream_id > STREAM_ID_LIMIT:
            raise ProtocolError("this connection has no stream ids left")
        self._next_id += 2
        self._streams[stream_id] = _Stream()
        payload = _SYN_STREAM.pack(stream_id, 0, 0, 0) + self._compressor.compress(headers)
        return stream_id, frames.control(FrameType.SYN_STREAM, payload)

    def reply(self, stream_id: int) -> bytes:
        """Accept a stream of the peer's."""
        payload = _ONE.pack(stream_id) + self._compressor.compress({})
        return frames.control(FrameType.SYN_REPLY, payload)

    def send(self, stream_id: int, data: bytes, *, fin: bool = False) -> bytes:
        """Return the frames of some data; nothing when our end of the stream is closed."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.local_done:
            return b""
        pieces = [data[at : at + DATA_LIMIT] for at in range(0, len(data), DATA_LIMIT)] or ([b""] if fin else [])
        last = len(pieces) - 1
        sent = b"".join(frames.data(stream_id, piece, fin=fin and i == last) for i, piece in enumerate(pieces))
        if fin:
            stream.local_done = True
            self._tidy(stream_id, stream)
        return sent

    def reset(self, stream_id: int, status: ResetStatus) -> bytes:
        """End a stream from our side; nothing when it has ended."""
        if self._streams.pop(stream_id, None) is None:
            return b""
        return _reset(stream_id, status)

    def go_away(self) -> bytes:
        """Announce the end of the connection; streams that the peer opens from now on are ignored."""
        self._going = True
        return frames.control(FrameType.GOAWAY, _PAIR.pack(self._last_peer_id, 0))

    def _data(self, piece: DataPiece) -> Event | None:
        stream = self._streams.get(piece.stream_id)
        if stream is None or stream.remote_done:
            return None  # on its way when the stream ended
        if piece.fin:
            stream.remote_done = True
            self._tidy(piece.stream_id, stream)
        return DataReceived(piece.stream_id, piece.data, piece.fin)

    def _control(self, frame: ControlFrame) -> Event | None:
        match frame.kind:
            case FrameType.SYN_STREAM:
                return self._opened(frame)
            case FrameType.SYN_REPLY:
                return self._replied(frame)
            case FrameType.HEADERS:
                # Kubernetes gives them no meaning, but later blocks build on this one, and FIN counts.
                stream_id = _stream_id(frame.payload)
                self._decompressor.decompress(frame.payload[_ONE.size :])
                return self._data(DataPiece(stream_id, b"", True)) if frame.flags & FLAG_FIN else None
            case FrameType.RST_STREAM:
                stream_id, status = _PAIR.unpack(frame.payload)
                known = self._streams.pop(stream_id & STREAM_ID_LIMIT, None)
                return StreamReset(stream_id & STREAM_ID_LIMIT, status) if known is not None else None
            case FrameType.PING:
                # Those of our parity are answers to ours.
                if (_ONE.unpack(frame.payload)[0] & 1) != self._client:
                    self._answers += frames.control(FrameType.PING, frame.payload)
                return None
            case FrameType.GOAWAY:
                return GoAway()

    def _opened(self, frame: ControlFrame) -> Event | None:
        stream_id = _stream_id(frame.payload)
        headers = self._decompressor.decompress(frame.payload[_SYN_STREAM.size :])
        if stream_id % 2 == self._client or stream_id <= self._last_peer_id:
            raise ProtocolError(f"a stream was opened with the id {stream_id}, after {self._last_peer_id}")
        self._last_peer_id = stream_id
        if self._going:
            return None
        if len(self._streams) >= self._limit:
            self._answers += _reset(stream_id, ResetStatus.REFUSED_STREAM)
            return None
        fin = bool(frame.flags & FLAG_FIN)
        self._streams[stream_id] = _Stream(remote_done=fin, local_done=bool(frame.flags & _UNIDIRECTIONAL))
        self._tidy(stream_id, self._streams[stream_id])
        return StreamOpened(stream_id, headers, fin)

    def _replied(self, frame: ControlFrame) -> Event | None:
        stream_id = _stream_id(frame.payload)
        self._decompressor.decompress(frame.payload[_ONE.size :])
        stream = self._streams.get(stream_id)
        if stream is None:
            return None
        fin = bool(frame.flags & FLAG_FIN)
        if fin:
            stream.remote_done = True
            self._tidy(stream_id, stream)
        return StreamReplied(stream_id, fin)

    def _tidy(self, stream_id: int, stream: _Stream) -> None:
        if stream.local_done and stream.remote_done:
            self._streams.pop(stream_id, None)


def _stream_id(payload: bytes) -> int:
    stream_id: int = _ONE.unpack_from(payload)[0] & STREAM_ID_LIMIT
    return stream_id


def _reset(stream_id: int, status: ResetStatus) -> bytes:
    return frames.control(FrameType.RST_STREAM, _PAIR.pack(stream_id, status))
