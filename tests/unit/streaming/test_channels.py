"""WebSocket channels: what one end says the other understands, however it is cut, and rubbish is refused."""

from __future__ import annotations

import base64
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, Ping, TextMessage

from tests.unit.streaming.test_spdy_codec import cut
from vmruntime.streaming.errors import ProtocolError
from vmruntime.streaming.websocket import handshake
from vmruntime.streaming.websocket.channels import (
    V1,
    V1_BASE64,
    V4,
    V4_BASE64,
    V5,
    ChannelClosed,
    ChannelData,
    Channels,
    Closed,
    Event,
    Tunnel,
)

PLACES = st.lists(st.integers(0, 100_000), max_size=10)


def receive(channels: Channels, chunks: Iterable[bytes]) -> list[Event]:
    return [event for chunk in chunks for event in channels.receive(chunk)]


def by_channel(events: Iterable[Event]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for event in events:
        if isinstance(event, ChannelData):
            found[event.channel] = found.get(event.channel, b"") + event.data
    return found


@pytest.mark.parametrize("protocol", [V5, V4, V4_BASE64, V1, V1_BASE64])
@given(st.lists(st.tuples(st.integers(0, 4), st.binary(min_size=1, max_size=500)), max_size=8), PLACES)
def test_channels_survive_any_cut(protocol: str, said: list[tuple[int, bytes]], places: list[int]) -> None:
    client, server = Channels(protocol, client=True), Channels(protocol)
    sent = b"".join(client.send(channel, data) for channel, data in said)
    expected: dict[int, bytes] = {}
    for channel, data in said:
        expected[channel] = expected.get(channel, b"") + data
    assert by_channel(receive(server, cut(sent, places))) == expected
    back = b"".join(server.send(channel, data) for channel, data in said)
    assert by_channel(receive(client, cut(back, places))) == expected


@given(st.integers(60_000, 100_000), PLACES)
@settings(max_examples=10)
def test_large_data_goes_in_pieces(size: int, places: list[int]) -> None:
    data = bytes(range(256)) * (size // 256)
    client, server = Channels(V5, client=True), Channels(V5)
    assert by_channel(receive(server, cut(client.send(0, data), places))) == {0: data}


def test_only_v5_closes_channels() -> None:
    client, server = Channels(V5, client=True), Channels(V5)
    assert receive(server, [client.close_channel(0)]) == [ChannelClosed(0)]
    old_client, old_server = Channels(V4, client=True), Channels(V4)
    assert old_client.close_channel(0) == b""
    assert receive(old_server, [old_client.send(255, b"\0")]) == [ChannelData(255, b"\0")]


def test_messages_in_fragments_and_an_empty_one() -> None:
    socket, server = Connection(ConnectionType.CLIENT), Channels(V5)
    sent = [
        socket.send(BytesMessage(data=b"\1ab", message_finished=False)),
        socket.send(Ping(payload=b"alive")),
        socket.send(BytesMessage(data=b"cd", message_finished=True)),
        socket.send(BytesMessage(data=b"")),
        socket.send(BytesMessage(data=b"\xff\0\0")),  # too long to close a channel
        socket.send(BytesMessage(data=b"\2e")),
    ]
    assert by_channel(receive(server, sent)) == {1: b"abcd", 2: b"e"}
    socket.receive_data(server.answers())
    assert [type(event).__name__ for event in socket.events()] == ["Pong"]


def test_the_goodbye() -> None:
    client, server = Channels(V5, client=True), Channels(V5)
    assert receive(server, [client.close()]) == [Closed(1000)]
    assert receive(client, [server.answers()]) == [Closed(1000)]
    assert client.send(1, b"late") == b""
    assert receive(server, [b"whatever"]) == []


def test_text_and_bytes_are_not_mixed() -> None:
    socket = Connection(ConnectionType.CLIENT)
    with pytest.raises(ProtocolError):
        receive(Channels(V5), [socket.send(TextMessage(data="0abc"))])
    with pytest.raises(ProtocolError):
        receive(Channels(V4_BASE64), [socket.send(BytesMessage(data=b"0abc"))])


@pytest.mark.parametrize("text", ["0!!!", "xYWJj", "0YW"])
def test_what_is_not_base64(text: str) -> None:
    with pytest.raises(ProtocolError):
        receive(Channels(V1_BASE64), [Connection(ConnectionType.CLIENT).send(TextMessage(data=text))])


def test_a_text_message_has_a_limit() -> None:
    socket, server = Connection(ConnectionType.CLIENT), Channels(V1_BASE64)
    part = TextMessage(data="0" * 60_000, message_finished=False)
    with pytest.raises(ProtocolError, match="more than"):
        receive(server, (socket.send(part) for _ in range(100)))


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=100), max_size=20), st.sampled_from([V5, V4_BASE64]))
def test_rubbish_never_crashes(chunks: list[bytes], protocol: str) -> None:
    channels = Channels(protocol)
    try:
        events = receive(channels, chunks)
    except ProtocolError:
        return
    assert sum(len(event.data) for event in events if isinstance(event, ChannelData)) <= sum(map(len, chunks))


@given(st.lists(st.binary(max_size=500), max_size=8), PLACES)
def test_a_tunnel_is_a_byte_stream(pieces: list[bytes], places: list[int]) -> None:
    client, server = Tunnel(client=True), Tunnel()
    sent = b"".join(client.send(piece) for piece in pieces) + client.close()
    assert b"".join(server.receive(chunk) for chunk in cut(sent, places)) == b"".join(pieces)
    assert server.closed
    assert server.answers() != b""


def test_the_choice_of_a_subprotocol() -> None:
    assert handshake.offered([" v5.channel.k8s.io, v4.channel.k8s.io", "x"]) == [V5, V4, "x"]
    assert handshake.choose([V4, V5], [V5, V4]) == V4
    assert handshake.choose([], [V5]) == ""
    assert handshake.choose(["x"], [V5]) is None


def test_the_answer_to_a_key() -> None:
    # The example of RFC 6455, 1.3.
    assert handshake.accept_token("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert handshake.accept_token("short") is None
    assert handshake.accept_token(base64.b64encode(b"x" * 15).decode()) is None
