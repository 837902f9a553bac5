"""Numbered channels in WebSocket messages: the first byte of a message says which channel the rest belongs to.

v5.channel.k8s.io         binary; a message 255, N closes channel N
v4.channel.k8s.io         binary; the error channel carries a metav1.Status
channel.k8s.io            binary; the error channel carries text
v4.base64.channel.k8s.io, base64.channel.k8s.io
text; the channel is a digit and what follows is base64
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Iterator

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.utilities import LocalProtocolError

from vmruntime.streaming.errors import ProtocolError

V5 = "v5.channel.k8s.io"
V4 = "v4.channel.k8s.io"
V4_BASE64 = "v4.base64.channel.k8s.io"
V1 = "channel.k8s.io"
V1_BASE64 = "base64.channel.k8s.io"

CLOSE_CHANNEL = 255
CHUNK = 32 * 1024
"""Bytes of one message that is sent."""

TEXT_LIMIT = 4 * 1024 * 1024
"""Characters of a base64 message, which has to be complete before it can be decoded."""

NORMAL_CLOSURE = 1000


@dataclasses.dataclass(frozen=True)
class ChannelData:
    """Bytes of a channel; a message may come in several pieces. None at all: the server's sign that all is ready."""

    channel: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class ChannelClosed:
    """The peer sends no more on a channel."""

    channel: int


@dataclasses.dataclass(frozen=True)
class Closed:
    """The connection is being closed; send answers(), then close it."""

    code: int


Event = ChannelData | ChannelClosed | Closed


class Channels:
    """One end of a connection after the handshake, without I/O."""

    def __init__(self, protocol: str, *, client: bool = False) -> None:
        self._socket = Connection(ConnectionType.CLIENT if client else ConnectionType.SERVER)
        self._text = protocol in (V4_BASE64, V1_BASE64)
        self._closes_channels = protocol == V5
        self._answers = bytearray()
        self._channel: int | None = None  # of the message that is under way
        self._pending = bytearray()  # of a message that must be complete first
        self._closed = False

    def receive(self, chunk: bytes) -> Iterator[Event]:
        """Iterate over what happened; use up the iterator, then send answers().

        Raises:
            ProtocolError: A message is not of the subprotocol.
        """
        if self._closed:
            return
        self._socket.receive_data(chunk)
        for event in self._socket.events():
            match event:
                case BytesMessage() if not self._text:
                    yield from self._binary(bytes(event.data), finished=event.message_finished)
                case TextMessage() if self._text:
                    yield from self._base64(event.data, finished=event.message_finished)
                case BytesMessage() | TextMessage():
                    raise ProtocolError("a message is text where bytes are expected, or the other way round")
                case Ping():
                    self._answers += self._socket.send(event.response())
                case CloseConnection():
                    self._closed = True
                    if self._socket.state is ConnectionState.REMOTE_CLOSING:
                        self._answers += self._socket.send(event.response())
                    yield Closed(int(event.code))
                    return
                case _:
                    pass  # a pong

    def answers(self) -> bytes:
        """Return, once, what the protocol itself answers."""
        answers = bytes(self._answers)
        self._answers.clear()
        return answers

    def send(self, channel: int, data: bytes) -> bytes:
        """Return the messages of some data; one empty message when there is none."""
        pieces = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)] or [b""]
        return b"".join(self._message(channel, piece) for piece in pieces)

    def close_channel(self, channel: int) -> bytes:
        """Say that no more comes on a channel; only v5 can."""
        return self._message(CLOSE_CHANNEL, bytes([channel])) if self._closes_channels else b""

    def close(self, code: int = NORMAL_CLOSURE) -> bytes:
        """Begin to close the connection."""
        return self._send(CloseConnection(code=code))

    def _message(self, channel: int, data: bytes) -> bytes:
        if self._text:
            return self._send(TextMessage(data=str(channel) + base64.b64encode(data).decode()))
        return self._send(BytesMessage(data=bytes([channel]) + data))

    def _send(self, event: BytesMessage | TextMessage | CloseConnection) -> bytes:
        try:
            return self._socket.send(event)
        except LocalProtocolError:
            return b""  # closing: nothing more can be said

    def _binary(self, data: bytes, *, finished: bool) -> Iterator[Event]:
        starts = self._channel is None and bool(data)
        if starts:
            self._channel, data = data[0], data[1:]
        if self._channel == CLOSE_CHANNEL and self._closes_channels:
            self._pending += data[: 2 - len(self._pending)]
        elif self._channel is not None and (data or (starts and finished)):
            yield ChannelData(self._channel, data)
        if finished:
            closing = self._channel == CLOSE_CHANNEL and len(self._pending) == 1
            number = self._pending[0] if closing else 0
            self._channel = None
            self._pending.clear()
            if closing:
                yield ChannelClosed(number)

    def _base64(self, text: str, *, finished: bool) -> Iterator[Event]:
        self._pending += text.encode()
        if len(self._pending) > TEXT_LIMIT:
            raise ProtocolError(f"a message has more than {TEXT_LIMIT} characters")
        if not finished:
            return
        message = bytes(self._pending)
        self._pending.clear()
        try:
            data = base64.b64decode(message[1:], validate=True)
            channel = int(message[:1]) if message else 0
        except (binascii.Error, ValueError):
            raise ProtocolError("a message is not a digit and base64") from None
        if message:
            yield ChannelData(channel, data)


class Tunnel:
    """Any byte stream in binary messages, whose bounds mean nothing."""

    def __init__(self, *, client: bool = False) -> None:
        self._socket = Connection(ConnectionType.CLIENT if client else ConnectionType.SERVER)
        self._answers = bytearray()
        self.closed = False

    def receive(self, chunk: bytes) -> bytes:
        """Return the bytes that arrived; then send answers() and look at `closed`.

        Raises:
            ProtocolError: A message is text.
        """
        if self.closed:
            return b""
        found = bytearray()
        self._socket.receive_data(chunk)
        for event in self._socket.events():
            match event:
                case BytesMessage():
                    found += event.data
                case TextMessage():
                    raise ProtocolError("a message is text where bytes are expected")
                case Ping():
                    self._answers += self._socket.send(event.response())
                case CloseConnection():
                    self.closed = True
                    if self._socket.state is ConnectionState.REMOTE_CLOSING:
                        self._answers += self._socket.send(event.response())
                    break
                case _:
                    pass
        return bytes(found)

    def answers(self) -> bytes:
        """Return, once, what the protocol itself answers."""
        answers = bytes(self._answers)
        self._answers.clear()
        return answers

    def send(self, data: bytes) -> bytes:
        """Return a message of some bytes."""
        return self._send(BytesMessage(data=data))

    def close(self) -> bytes:
        """Begin to close the connection."""
        return self._send(CloseConnection(code=NORMAL_CLOSURE))

    def _send(self, event: BytesMessage | TextMessage | CloseConnection) -> bytes:
        try:
            return self._socket.send(event)
        except LocalProtocolError:
            return b""
