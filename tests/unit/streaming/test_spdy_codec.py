"""SPDY's frames and header blocks: what one end says the other understands, however it is cut, and rubbish is refused."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
import zlib
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmruntime.streaming.errors import ProtocolError
from vmruntime.streaming.spdy import frames
from vmruntime.streaming.spdy.connection import (
    Connection,
    DataReceived,
    Event,
    GoAway,
    ResetStatus,
    StreamOpened,
    StreamReplied,
    StreamReset,
)
from vmruntime.streaming.spdy.dictionary import DICTIONARY
from vmruntime.streaming.spdy.frames import ControlFrame, DataPiece, FrameParser, FrameType
from vmruntime.streaming.spdy.headers import BLOCK_LIMIT, FIELD_LIMIT, HeaderCompressor, HeaderDecompressor

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20).map(str.lower)
VALUES = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=50)
HEADERS = st.dictionaries(NAMES, VALUES, max_size=10)
# A captured opening of a stream as Go's implementation writes it begins with these bytes.
SYN_STREAM_HEAD = bytes.fromhex("80030001")


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def receive(connection: Connection, chunks: Iterable[bytes]) -> list[Event]:
    return [event for chunk in chunks for event in connection.receive(chunk)]


def joined(events: Sequence[Event]) -> list[object]:
    """Return events with adjacent pieces of one stream's data put together: their bounds mean nothing."""
    found: list[object] = []
    for event in events:
        last = found[-1] if found else None
        if (
            isinstance(event, DataReceived)
            and isinstance(last, DataReceived)
            and last.stream_id == event.stream_id
            and not last.fin
        ):
            found[-1] = DataReceived(event.stream_id, last.data + event.data, event.fin)
        else:
            found.append(event)
    return found


def pair() -> tuple[Connection, Connection]:
    return Connection(client=True, stream_limit=8), Connection(client=False, stream_limit=8)


def test_the_dictionary_is_the_protocols() -> None:
    # Both numbers are the protocol's: its length, and the id by which zlib knows it.
    assert (len(DICTIONARY), zlib.adler32(DICTIONARY)) == (1423, 0xE3C6A7C2)


@given(st.lists(HEADERS, max_size=5))
def test_headers_survive(blocks: list[dict[str, str]]) -> None:
    compressor, decompressor = HeaderCompressor(), HeaderDecompressor()
    for headers in blocks:
        assert decompressor.decompress(compressor.compress(headers)) == headers


@given(st.binary(max_size=200))
def test_rubbish_is_no_header_block(rubbish: bytes) -> None:
    try:
        HeaderDecompressor().decompress(rubbish)
    except ProtocolError:
        return
    # The rare text that is one by chance.
    assert rubbish


def compressed(plain: bytes) -> bytes:
    packer = zlib.compressobj(zdict=DICTIONARY)
    return packer.compress(plain) + packer.flush(zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize(
    "plain",
    [
        struct.pack(">I", 1001),
        struct.pack(">I", 1) + struct.pack(">I", FIELD_LIMIT + 1),
        struct.pack(">I", 2) + (struct.pack(">I", 1) + b"a" + struct.pack(">I", 0)) * 2,
        struct.pack(">I", 1) + struct.pack(">II", 0, 0),
        struct.pack(">I", 1) + struct.pack(">I", 5) + b"ab",
        struct.pack(">I", 0) + b"more",
        b"\0",
        bytes(BLOCK_LIMIT + 1),
    ],
)
def test_header_blocks_beyond_the_limits(plain: bytes) -> None:
    with pytest.raises(ProtocolError):
        HeaderDecompressor().decompress(compressed(plain))


def test_a_block_of_a_few_bytes_cannot_fill_the_memory() -> None:
    bomb = compressed(bytes(256 * 1024 * 1024))
    assert len(bomb) < 300 * 1024
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="more than"):
            HeaderDecompressor().decompress(bomb)
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024 * 1024
    finally:
        tracemalloc.stop()


@given(
    st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.binary(max_size=300), st.booleans()), max_size=10),
    st.lists(st.integers(0, 10_000), max_size=20),
)
def test_frames_survive_any_cut(pieces: list[tuple[int, bytes, bool]], places: list[int]) -> None:
    sent = b"".join(frames.data(stream, data, fin=fin) for stream, data, fin in pieces)
    sent += frames.control(FrameType.PING, b"abcd") + frames.control(FrameType.GOAWAY, bytes(8))
    parser = FrameParser()
    found: dict[int, bytes] = {}
    fins: dict[int, int] = {}
    control = []
    for chunk in cut(sent, places):
        for frame in parser.receive(chunk):
            if isinstance(frame, DataPiece):
                found[frame.stream_id] = found.get(frame.stream_id, b"") + frame.data
                fins[frame.stream_id] = fins.get(frame.stream_id, 0) + frame.fin
            else:
                control.append(frame)
    for stream in {stream for stream, _, _ in pieces}:
        assert found[stream] == b"".join(data for number, data, _ in pieces if number == stream)
        assert fins[stream] == sum(fin for number, _, fin in pieces if number == stream)
    assert control == [ControlFrame(FrameType.PING, 0, b"abcd"), ControlFrame(FrameType.GOAWAY, 0, bytes(8))]


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=100), max_size=20), st.booleans())
def test_rubbish_never_crashes_a_connection(chunks: list[bytes], control: bool) -> None:
    connection = Connection(client=False, stream_limit=4)
    try:
        if control:
            receive(connection, [SYN_STREAM_HEAD])
        receive(connection, chunks)
    except ProtocolError:
        return
    assert len(connection.answers()) <= sum(map(len, chunks)) * 2


@pytest.mark.parametrize("head", [frames.data(1, b""), frames.control(FrameType.PING, b"")])
def test_only_one_control_frame_is_kept(head: bytes) -> None:
    """A frame that announces more than it sends costs what it sent, and data costs nothing."""
    announced = head[:4] + struct.pack(">I", 0x00FFFFFF)
    parser = FrameParser()
    try:
        kept = list(parser.receive(announced + b"x" * 1000))
    except ProtocolError:
        return
    assert sum(len(piece.data) for piece in kept if isinstance(piece, DataPiece)) == 1000
    assert len(parser._buffer) == 0


def test_unknown_control_frames_are_skipped() -> None:
    unknown = struct.pack(">II", 0x80030004, 0x00FFFFFF) + bytes(0xFFFFFF)
    parser = FrameParser()
    found = [frame for chunk in cut(unknown, [5, 9, 100, 70_000]) for frame in parser.receive(chunk)]
    assert found == []
    assert len(list(parser.receive(frames.control(FrameType.PING, b"abcd")))) == 1


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">II", 0x80020001, 10) + bytes(10),  # SPDY/2
        struct.pack(">II", 0, 0),  # data of stream 0
        frames.control(FrameType.PING, b"abc"),
        frames.control(FrameType.SYN_STREAM, b"abc"),
        struct.pack(">II", 0x80030001, 0x00FFFFFF),
    ],
)
def test_frames_that_break_the_protocol(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(FrameParser().receive(frame))


@given(
    HEADERS,
    st.lists(st.tuples(st.booleans(), st.binary(max_size=2000)), max_size=8),
    st.lists(st.integers(0, 20_000), max_size=10),
)
def test_a_conversation(headers: dict[str, str], said: list[tuple[bool, bytes]], places: list[int]) -> None:
    client, server = pair()
    stream, opening = client.open(headers)
    sent = opening + b"".join(client.send(stream, data) for _, data in said) + client.send(stream, b"", fin=True)
    events = joined(receive(server, cut(sent, places)))
    assert events[0] == StreamOpened(stream, headers, False)
    assert events[1:] == [DataReceived(stream, b"".join(data for _, data in said), True)]
    answer = server.reply(stream) + server.send(stream, b"answer", fin=True)
    assert joined(receive(client, cut(answer, places))) == [
        StreamReplied(stream, False),
        DataReceived(stream, b"answer", True),
    ]
    assert server.send(stream, b"late") == b""
    assert server.reset(stream, ResetStatus.CANCEL) == b""


def test_pings_are_answered_by_the_other_side_only() -> None:
    _, server = pair()
    assert receive(server, [frames.control(FrameType.PING, struct.pack(">I", 1))]) == []
    assert server.answers() == frames.control(FrameType.PING, struct.pack(">I", 1))
    assert receive(server, [frames.control(FrameType.PING, struct.pack(">I", 2))]) == []
    assert server.answers() == b""


def test_streams_beyond_the_limit_are_refused() -> None:
    client, server = pair()
    opened = receive(server, [client.open({"n": str(n)})[1] for n in range(10)])
    assert len(opened) == 8
    refused = receive(client, [server.answers()])
    assert [type(event) for event in refused] == [StreamReset, StreamReset]
    assert {event.status for event in refused if isinstance(event, StreamReset)} == {ResetStatus.REFUSED_STREAM}
    server.reset(1, ResetStatus.CANCEL)
    assert len(receive(server, [client.open({})[1]])) == 1


def test_stream_ids_only_grow() -> None:
    client, server = pair()
    _, first = client.open({})
    receive(server, [first])
    again = Connection(client=True, stream_limit=1).open({})[1]
    with pytest.raises(ProtocolError):
        receive(server, [again])


def test_a_reset_ends_a_stream_and_data_on_its_way_is_dropped() -> None:
    client, server = pair()
    stream, opening = client.open({})
    receive(server, [opening])
    assert receive(client, [server.reset(stream, ResetStatus.CANCEL)]) == [StreamReset(stream, ResetStatus.CANCEL)]
    assert client.send(stream, b"x") == b""
    assert receive(server, [frames.data(stream, b"on its way")]) == []
    assert receive(client, [server.go_away()]) == [GoAway()]
    assert receive(server, [client.open({})[1]]) == []
