"""Port-forward through the server to real ports on loopback, over SPDY, a tunnel and channels."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.unit.streaming.conftest import Rig
from tests.unit.streaming.test_remote import everything
from vmruntime.errors import FailedPrecondition
from vmruntime.model.streams import PortForwardSpec
from vmruntime.streaming import portforward
from vmruntime.streaming.client import open_channels, open_spdy, open_tunnel
from vmruntime.streaming.errors import ClientGone
from vmruntime.streaming.session import SpdySession, SpdyStream
from vmruntime.streaming.websocket.channels import V4

POD = PortForwardSpec(sandbox_id="pod")
PROTOCOL = "portforward.k8s.io"
OPENERS = {"spdy": (open_spdy, PROTOCOL), "tunnel": (open_tunnel, f"SPDY/3.1+{PROTOCOL}")}

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer what came, backwards, once the client has said that nothing more comes."""
    data = await reader.read()
    writer.write(data[::-1])
    writer.close()


async def connect(session: SpdySession, port: int, request: str) -> tuple[SpdyStream, SpdyStream]:
    headers = {"port": str(port), "requestID": request}
    error = await session.open({"streamType": "error", **headers})
    await error.close_write()
    return await session.open({"streamType": "data", **headers}), error


async def refused(session: SpdySession, headers: dict[str, str]) -> None:
    """Open a stream and see it reset, which may come together with the answer."""
    with contextlib.suppress(ClientGone):
        stream = await session.open(headers)
        await asyncio.wait_for(stream.wait_reset(), 10)


@pytest.mark.parametrize("way", OPENERS)
async def test_many_connections_at_once_with_half_close(rig: Rig, way: str) -> None:
    opener, protocol = OPENERS[way]
    async with listening(reverse) as port, opener(rig.server.port_forward_url(POD), [protocol]) as (session, chosen):
        assert chosen == protocol

        async def one(number: int) -> None:
            data, error = await connect(session, port, str(number))
            sent = os.urandom(50_000 + number)
            await data.write(sent)
            await data.close_write()
            assert await everything(data) == sent[::-1]
            assert await everything(error) == b""

        await asyncio.gather(*(one(number) for number in range(50)))


async def test_streams_of_ended_connections_are_forgotten(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portforward, "STREAM_LIMIT", 64)
    async with listening(reverse) as port, open_spdy(rig.server.port_forward_url(POD), [PROTOCOL]) as (session, _):
        for number in range(40):  # with more streams than may be open at once
            data, error = await connect(session, port, str(number))
            await data.close_write()
            assert (await everything(data), await everything(error)) == (b"", b"")


async def test_a_refused_port_is_told_and_the_others_go_on(rig: Rig) -> None:
    async with listening(reverse) as port, open_spdy(rig.server.port_forward_url(POD), [PROTOCOL]) as (session, _):
        data, error = await connect(session, 1, "a")
        assert await everything(error) == b"error forwarding port 1 to pod pod: connect to port 1: connection refused"
        assert await everything(data) == b""
        data, error = await connect(session, port, "b")
        await data.close_write()
        assert await everything(error) == b""


async def test_a_broken_connection_is_a_reset_and_not_an_error(rig: Rig) -> None:
    async def abort(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.get_extra_info("socket").setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER 0: close with RST
        writer.transport.abort()

    async with listening(abort) as port, open_spdy(rig.server.port_forward_url(POD), [PROTOCOL]) as (session, _):
        data, error = await connect(session, port, "a")
        await data.write(b"x")
        await asyncio.wait_for(data.wait_reset(), 10)
        assert await everything(error) == b""


async def test_a_client_that_resets_closes_the_connection(rig: Rig) -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()
        ended.set()

    async with listening(wait) as port, open_spdy(rig.server.port_forward_url(POD), [PROTOCOL]) as (session, _):
        data, _ = await connect(session, port, "a")
        await data.write(b"x")
        await data.reset()
        await asyncio.wait_for(ended.wait(), 10)


async def test_old_clients_name_no_request(rig: Rig) -> None:
    async with listening(reverse) as port, open_spdy(rig.server.port_forward_url(POD), [PROTOCOL]) as (session, _):
        error = await session.open({"streamtype": "error", "port": str(port)})
        data = await session.open({"streamtype": "data", "port": str(port)})
        await data.write(b"ab")
        await data.close_write()
        assert (await everything(data), await everything(error)) == (b"ba", b"")


@pytest.mark.parametrize(
    "headers",
    [{}, {"streamtype": "data"}, {"streamtype": "data", "port": "0"}, {"streamtype": "error", "port": "65536"},
     {"streamtype": "data", "port": "x"}, {"streamtype": "stdin", "port": "80"}],
)  # fmt: skip
async def test_streams_without_sense_are_reset(rig: Rig, headers: dict[str, str]) -> None:
    async with open_spdy(rig.server.port_forward_url(POD), [PROTOCOL]) as (session, _):
        await refused(session, headers)


async def test_both_streams_must_come_in_time(rig: Rig) -> None:
    async with open_spdy(rig.server.port_forward_url(POD), [PROTOCOL]) as (session, _):
        error = await session.open({"streamtype": "error", "port": "80", "requestid": "7"})
        assert await everything(error) == b"request 7: not both streams were opened within 0.3 s"


async def test_a_sandbox_that_does_not_run(rig: Rig) -> None:
    rig.pods.refuse = FailedPrecondition("the sandbox is not ready")
    async with open_spdy(rig.server.port_forward_url(POD), [PROTOCOL]) as (session, _):
        await asyncio.wait_for(session.wait_gone(), 10)


@pytest.mark.parametrize("named_by", ["request", "query"])
async def test_channels(rig: Rig, named_by: str) -> None:
    async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(3)).upper())
        writer.close()

    async with listening(upper) as port:
        if named_by == "request":
            url = rig.server.port_forward_url(PortForwardSpec(sandbox_id="pod", ports=[port, 1]))
        else:
            url = rig.server.port_forward_url(POD) + f"?port={port},1"
        async with open_channels(url, [V4], range(4)) as (session, _):
            await session.send(0, b"abc")
            assert await everything((session, 0)) == struct.pack("<H", port) + b"ABC"
            assert await everything((session, 1)) == struct.pack("<H", port)
            assert (await everything((session, 3)))[2:].startswith(b"error forwarding port 1 to pod pod")
