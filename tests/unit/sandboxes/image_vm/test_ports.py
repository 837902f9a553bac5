"""A machine's ports, here those of this host's loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import PortStream
from vmruntime.errors import Code
from vmruntime.sandboxes.image_vm import ports
from vmruntime.sandboxes.image_vm.ports import MachinePorts

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(serve: Serve, address: str = "127.0.0.1") -> AsyncIterator[int]:
    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()
            done.set()

    server = await asyncio.start_server(handle, address, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait_for(done.wait(), 10)


async def everything(stream: PortStream) -> bytes:
    async with asyncio.timeout(20):
        return b"".join([data async for data in stream.read()])


async def turn_around(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say what was said, once all of it was."""
    writer.write(await reader.read(-1))
    await writer.drain()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_each_side_says_when_it_has_done(address: str) -> None:
    text = bytes(range(256)) * 8192
    async with listening(turn_around, address) as port, MachinePorts([address]).connect(port) as stream:
        async with asyncio.TaskGroup() as group:
            got = group.create_task(everything(stream))
            await stream.write(text)
            await stream.close_write()
        assert got.result() == text


async def test_another_address_is_tried() -> None:
    async with listening(turn_around) as port, MachinePorts(["::1", "127.0.0.1"]).connect(port) as stream:
        await stream.write(b"x")
        await stream.close_write()
        assert await everything(stream) == b"x"


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(AgentError, match=rf"connect to port {port}: 127.0.0.1: .*refused.*; ::1: ") as caught:
        async with MachinePorts(["127.0.0.1", "::1"]).connect(port):
            pass
    assert caught.value.code is Code.FAILED_PRECONDITION
    with pytest.raises(AgentError, match="the pod has no address"):
        async with MachinePorts([]).connect(port):
            pass


async def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "CONNECT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as stack:
        address = server.getsockname()
        for _ in range(3):  # the backlog is full: more connections get no answer
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(address)
        await asyncio.sleep(0.05)
        with pytest.raises(AgentError, match=r"no answer within 0\.1 s"):
            async with MachinePorts(["127.0.0.1"]).connect(address[1]):
                pass


async def test_a_connection_that_breaks() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        found = writer.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with listening(reset) as port, MachinePorts(["127.0.0.1"]).connect(port) as stream:
        await stream.write(b"xy")
        with pytest.raises(AgentError, match="reset") as caught:
            await everything(stream)
        assert caught.value.code is Code.ABORTED
        await stream.write(b"nobody takes this")
        await stream.close_write()


async def test_what_was_written_arrives_after_leaving() -> None:
    text = b"x" * 1_000_000
    got = asyncio.get_running_loop().create_future()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result(await reader.read(-1))

    async with listening(take) as port:
        async with MachinePorts(["127.0.0.1"]).connect(port) as stream:
            await stream.write(text)
        assert await asyncio.wait_for(got, 10) == text


async def test_who_reads_nothing_is_not_written_to_for_ever() -> None:
    leave = asyncio.Event()

    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await leave.wait()

    async with listening(ignore) as port, MachinePorts(["127.0.0.1"]).connect(port) as stream:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.write(b"x" * (64 * 1024 * 1024)), 0.5)
        leave.set()
