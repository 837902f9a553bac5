"""Peers that say anything: the real server and the real clients, over sockets, with bytes nobody would send.

Whatever comes, a session ends soon after its peer has gone, nothing of it is left, and nothing is reported as a defect.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import os
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.support.examples import examples
from tests.unit.streaming.fakes import FakePods
from tests.unit.streaming.test_spdy_codec import cut
from vmruntime.config.settings import StreamingSettings
from vmruntime.errors import VmruntimeError
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec
from vmruntime.streaming.client import open_channels, open_spdy, open_tunnel
from vmruntime.streaming.errors import StreamingError
from vmruntime.streaming.server import StreamingServer
from vmruntime.streaming.spdy import frames
from vmruntime.streaming.spdy.connection import Connection
from vmruntime.streaming.spdy.dictionary import DICTIONARY
from vmruntime.streaming.spdy.frames import FrameType
from vmruntime.streaming.websocket.channels import V1_BASE64, V5, Channels, Tunnel
from vmruntime.streaming.websocket.handshake import accept_token

PATIENCE = 20.0
SETTINGS = settings(
    max_examples=examples(25),
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # making an example smaller takes long with time-outs in it
)
FLOOD = 6 * 1024 * 1024
"""Bytes; sockets hold some of them."""

PLACES = st.lists(st.integers(0, 5000), max_size=6)

types = st.sampled_from(["stdin", "stdout", "stderr", "error", "resize", "data", "", "x" * 3000])
ports = st.sampled_from(["80", "0", "-1", "65536", "000001", "000001" + "1" * 5000, "\xb2", "", "1e3", "7" * 9])
headers = st.one_of(
    st.fixed_dictionaries({"streamType": types}, optional={"port": ports, "requestID": st.sampled_from("ab0")}),
    st.dictionaries(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9), types),
)
stream_ids = st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1])
payloads = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"{" * 5000, b'{"Width":-1,"Height":1e9}', b"x" * 70_000])
)

Step = Callable[[Connection], bytes]


def opening(fields: dict[str, str], flags: int) -> Step:
    def step(connection: Connection) -> bytes:
        frame = bytearray(connection.open(fields)[1])
        frame[4] = flags
        return bytes(frame)

    return step


def plain(data: bytes) -> Step:
    return lambda connection: data


@functools.cache
def bomb(kind: FrameType, size: int) -> bytes:
    packer = zlib.compressobj(zdict=DICTIONARY)
    block = packer.compress(bytes(size)) + packer.flush(zlib.Z_SYNC_FLUSH)
    return frames.control(kind, (b"\0\0\0\1" + bytes(6) if kind is FrameType.SYN_STREAM else b"\0\0\0\1") + block)


steps: st.SearchStrategy[Step] = st.one_of(
    st.builds(opening, headers, st.sampled_from([0, 0, 0, 1, 2, 3, 255])),
    st.builds(opening, headers, st.just(0)),
    st.builds(lambda stream, data, fin: plain(frames.data(stream, data, fin=fin)), stream_ids, payloads, st.booleans()),
    st.builds(
        lambda kind, flags, payload: plain(frames.control(kind, payload, flags=flags)),
        st.sampled_from(FrameType),
        st.sampled_from([0, 1, 255]),
        st.one_of(st.binary(max_size=12), st.sampled_from([b"\0\0\0\1\0\0\0\5", b"\0\0\0\2", bytes(8)])),
    ),
    st.builds(
        lambda kind, size: plain(bomb(kind, size)), st.sampled_from([*FrameType][:2]), st.sampled_from([9, 1 << 24])
    ),
    st.builds(plain, st.binary(max_size=40)),
)


def spdy(said: Sequence[Step]) -> bytes:
    connection = Connection(client=True, stream_limit=8)
    return b"".join(step(connection) for step in said)


messages = st.one_of(
    st.tuples(st.integers(0, 255), payloads).map(lambda one: Channels(V5, client=True).send(*one)),
    st.tuples(st.integers(0, 4), st.binary(max_size=9)).map(lambda one: Channels(V1_BASE64, client=True).send(*one)),
    st.integers(0, 255).map(lambda channel: Channels(V5, client=True).close_channel(channel)),
    st.just(Channels(V5, client=True).close()),
    st.binary(max_size=40),
    # Lengths of 2^63 and 2^16 bytes, a control frame that is too long, reserved bits and opcodes, no mask.
    st.sampled_from(
        ["82ffffffffffffffffff", "82feffff", "89ff", "f280", "8380", "8205", "88820000000003e8", "0180"]
    ).map(bytes.fromhex),
)


class Place:
    """A server in an event loop of its own, and what is left of its sessions."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.run = runner.run
        self.pods = FakePods()
        self.run(self._open())

    async def _open(self) -> None:
        self.server = StreamingServer(
            self.pods,  # type: ignore[arg-type]
            StreamingSettings(),
            creation_timeout=0.1,
            idle_timeout=30.0,
        )
        await self.server.start()
        self.echo = await asyncio.start_server(_echo, "127.0.0.1", 0)

    async def close(self) -> None:
        await self.server.stop()
        self.echo.close()
        await self.echo.wait_closed()

    def url(self, kind: str, *, tty: bool = False) -> str:
        if kind == "exec":
            return self.server.exec_url(ExecSpec(container_id="c", argv=["cat"], stdin=True, tty=tty, stderr=not tty))
        if kind == "attach":
            return self.server.attach_url(AttachSpec(container_id="c", stdin=True, tty=tty, stderr=not tty))
        port = self.echo.sockets[0].getsockname()[1]
        return self.server.port_forward_url(PortForwardSpec(sandbox_id="s", ports=[port]))

    def talk(self, url: str, head: bytes, chunks: Sequence[bytes]) -> list[Any]:
        """Say bytes to the server, close, and return what it logged; it must be done with us soon."""
        with capture_logs() as logs:
            self.run(self._talk(url, head, chunks))
        return logs

    async def _talk(self, url: str, head: bytes, chunks: Sequence[bytes]) -> None:
        host, port = url.split("/")[2].split(":")
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 101"), answer
            drained = asyncio.ensure_future(_drain(reader))
            with contextlib.suppress(OSError):  # the server may be done with us
                for chunk in chunks:
                    writer.write(chunk)
                    await writer.drain()
                    await asyncio.sleep(0)
                writer.write_eof()
            writer.transport.abort() if len(chunks) % 2 else None
            await drained
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            while self.server._scope._tasks:
                await asyncio.sleep(0.001)


async def _drain(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(65536):
            pass


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with asyncio.Runner() as runner:
        place = Place(runner)
        yield place
        runner.run(place.close())


def request(url: str, *fields: str) -> bytes:
    path = "/" + url.split("/", 3)[3]
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", "Connection: Upgrade", *fields, "", ""]).encode()


SPDY = ("Upgrade: SPDY/3.1",)
KEY = f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}"
WEBSOCKET = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", KEY)


def no_defect(logs: Sequence[Any]) -> None:
    defects = [entry for entry in logs if entry["log_level"] in ("error", "critical")]
    assert not defects, defects


@pytest.mark.parametrize("kind", ["exec", "attach", "portforward"])
def test_a_spdy_client_that_says_anything(place: Place, kind: str) -> None:
    @SETTINGS
    @given(said=st.lists(steps, max_size=12), places=PLACES, tty=st.booleans())
    def run(said: list[Step], places: list[int], tty: bool) -> None:
        url = place.url(kind, tty=tty)
        no_defect(place.talk(url, request(url, *SPDY), cut(spdy(said), places)))

    run()


@pytest.mark.parametrize("kind", ["exec", "attach", "portforward"])
@pytest.mark.parametrize("protocol", [V5, V1_BASE64, "v4.channel.k8s.io"])
def test_a_websocket_client_that_says_anything(place: Place, kind: str, protocol: str) -> None:
    spoken = {V5: "v4.channel.k8s.io", V1_BASE64: "v4.base64.channel.k8s.io"}.get(protocol, protocol)
    name = spoken if kind == "portforward" else protocol

    @SETTINGS
    @given(said=st.lists(messages, max_size=12), places=PLACES, tty=st.booleans())
    def run(said: list[bytes], places: list[int], tty: bool) -> None:
        url = place.url(kind, tty=tty)
        head = request(url, *WEBSOCKET, f"Sec-WebSocket-Protocol: {name}")
        no_defect(place.talk(url, head, cut(b"".join(said), places)))

    run()


def test_a_tunnel_in_which_anything_is_said(place: Place) -> None:
    @SETTINGS
    @given(said=st.lists(steps, max_size=12), places=PLACES, more=st.lists(messages, max_size=2))
    def run(said: list[Step], places: list[int], more: list[bytes]) -> None:
        url = place.url("portforward")
        head = request(url, *WEBSOCKET, "Sec-WebSocket-Protocol: SPDY/3.1+portforward.k8s.io")
        tunnel = Tunnel(client=True)
        chunks = [tunnel.send(chunk) for chunk in cut(spdy(said), places)]
        no_defect(place.talk(url, head, [*chunks, *more]))

    run()


def test_what_is_no_request(place: Place) -> None:
    """Before the upgrade there is HTTP, of which a client may know nothing."""

    async def say(data: bytes) -> None:
        host, port = place.url("exec").split("/")[2].split(":")
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(host, int(port))
            with contextlib.suppress(OSError):
                writer.write(data)
                writer.write_eof()
                await _drain(reader)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            while place.server._scope._tasks:
                await asyncio.sleep(0.001)

    good = request("http://x/exec/none", *WEBSOCKET)

    @SETTINGS
    @given(
        data=st.one_of(
            st.binary(max_size=200),
            st.integers(0, len(good)).map(lambda at: good[:at]),
            st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)).map(
                lambda one: good[: one[0]] + bytes([one[1]]) + good[one[0] + 1 :]
            ),
            st.sampled_from([b"GET /" + b"a" * 100_000, b"\r\n" * 50_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000]),
        )
    )
    def run(data: bytes) -> None:
        with capture_logs() as logs:
            place.run(say(data))
        no_defect(logs)

    run()


def test_streams_that_are_opened_and_reset_without_end_take_no_memory(place: Place) -> None:
    """Nobody reads the server's replies meanwhile: it has to stop reading rather than to queue them."""

    async def flood(url: str) -> int:
        host, port = url.split("/")[2].split(":")
        connection = Connection(client=True, stream_limit=8)
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, (host, int(port)))
            await loop.sock_sendall(client, request(url, *SPDY))
            await loop.sock_recv(client, 4096)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < FLOOD:
                    data = b""
                    for _ in range(50):
                        number, frame = connection.open({"port": "0", "streamType": "data"})
                        data += frame + frames.control(FrameType.RST_STREAM, number.to_bytes(4, "big") + b"\0\0\0\5")
                    async with asyncio.timeout(1):
                        await loop.sock_sendall(client, data)
                    sent += len(data)
                    await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            while place.server._scope._tasks:
                await asyncio.sleep(0.01)
        return sent

    assert place.server._server is not None
    for listening in place.server._server.sockets:  # what it accepts is like it: the kernel shall not queue megabytes
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    assert place.run(flood(place.url("portforward"))) < FLOOD


@pytest.mark.parametrize("port", ["000001" + "1" * 5000, "99999", "0", "-1", "\xb2"])
def test_ports_that_are_none(place: Place, port: str) -> None:
    connection = Connection(client=True, stream_limit=8)
    opened = [
        connection.open({"port": given, "streamType": kind, "requestID": "0"})[1]
        for kind, given in (("error", "80"), ("data", port))
    ]
    url = place.url("portforward")
    place.pods.dialled.clear()
    no_defect(place.talk(url, request(url, *SPDY), opened))
    assert place.pods.dialled == []


# --- the clients


Opener = Callable[[str], Awaitable[None]]


async def use_channels(url: str) -> None:
    async with open_channels(url, [V5], range(5)) as (session, _):
        await session.send(0, b"input")
        while await session.read(1):
            pass


async def use_spdy(url: str) -> None:
    async with open_spdy(url, ["v4.channel.k8s.io"]) as (session, _):
        stream = await session.open({"streamType": "stdin"})
        await stream.write(b"input")
        while await stream.read():
            pass


async def use_tunnel(url: str) -> None:
    async with open_tunnel(url, ["SPDY/3.1+portforward.k8s.io"]) as (session, _):
        stream = await session.open({"streamType": "data", "port": "1", "requestID": "0"})
        while await stream.read():
            pass


class Liar:
    """A server that answers the upgrade as it should, and then says what it is told."""

    def __init__(self, *, upgrade: bool, chunks: Sequence[bytes]) -> None:
        self._upgrade = upgrade
        self._chunks = chunks

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/exec/x"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            if self._upgrade:
                fields = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in head.splitlines()}
                token = accept_token(fields.get("sec-websocket-key", "")) or ""
                answer = ["HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: x"]
                writer.write("\r\n".join([*answer, f"Sec-WebSocket-Accept: {token}", "", ""]).encode())
            for chunk in self._chunks:
                writer.write(chunk)
                await writer.drain()
        writer.close()


def server_messages() -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.tuples(st.integers(0, 255), payloads).map(lambda one: Channels(V5).send(*one)),
        st.just(Channels(V5).close()),
        steps.map(lambda step: Tunnel().send(step(Connection(client=False, stream_limit=8)))),
        steps.map(lambda step: step(Connection(client=False, stream_limit=8))),
        st.binary(max_size=40),
    )


@pytest.mark.parametrize("use", [use_channels, use_spdy, use_tunnel])
def test_a_server_that_says_anything(place: Place, use: Opener) -> None:
    async def try_it(liar: Liar) -> None:
        async with asyncio.timeout(PATIENCE), liar.serving() as url:
            with contextlib.suppress(StreamingError, VmruntimeError):
                await use(url)

    @SETTINGS
    @given(
        upgrade=st.sampled_from([True, True, True, False]), said=st.lists(server_messages(), max_size=8), places=PLACES
    )
    def run(upgrade: bool, said: list[bytes], places: list[int]) -> None:
        with capture_logs() as logs:
            place.run(try_it(Liar(upgrade=upgrade, chunks=cut(b"".join(said), places))))
        no_defect(logs)

    run()
