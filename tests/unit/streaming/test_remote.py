"""Exec and attach through the server, over each protocol, with our own client at the other end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator

import pytest

from tests.unit.streaming.conftest import Rig
from tests.unit.streaming.fakes import FakeProcess, forever
from vmruntime.agent.errors import AgentGone
from vmruntime.errors import FailedPrecondition, Unavailable
from vmruntime.model.streams import AttachSpec, ExecSpec, TerminalSize
from vmruntime.streaming.channel_session import ChannelSession
from vmruntime.streaming.client import open_channels, open_spdy
from vmruntime.streaming.errors import ClientGone
from vmruntime.streaming.session import SpdySession, SpdyStream
from vmruntime.streaming.sizes import encode_size
from vmruntime.streaming.websocket.channels import V1, V4, V4_BASE64, V5

READABLE = (1, 2, 3)


def spec(**fields: object) -> ExecSpec:
    return ExecSpec(container_id="c", argv=["x"], **fields)  # type: ignore[arg-type]


async def everything(read: SpdyStream | tuple[ChannelSession, int]) -> bytes:
    found = bytearray()
    async with asyncio.timeout(20):
        while data := await (read.read() if isinstance(read, SpdyStream) else read[0].read(read[1])):
            found += data
    return bytes(found)


async def open_streams(session: SpdySession, *kinds: str) -> dict[str, SpdyStream]:
    return {kind: await session.open({"streamType": kind}) for kind in kinds}


@contextlib.asynccontextmanager
async def spdy(rig: Rig, asked: ExecSpec, protocol: str = V4) -> AsyncIterator[dict[str, SpdyStream]]:
    kinds = ["error", *(kind for kind in ("stdin", "stdout", "stderr") if getattr(asked, kind))]
    if asked.tty and protocol not in (V1, "v2.channel.k8s.io"):
        kinds.append("resize")
    async with open_spdy(rig.server.exec_url(asked), [protocol]) as (session, chosen):
        assert chosen == protocol
        yield await open_streams(session, *kinds)


async def greet(process: FakeProcess) -> None:
    await process.say(b"out\n")
    await process.say(b"err\n", stderr=True)
    await process.exit(3)


async def test_output_and_exit_code_over_spdy(rig: Rig) -> None:
    rig.pods.script = greet
    async with spdy(rig, spec()) as streams:
        assert await everything(streams["stdout"]) == b"out\n"
        assert await everything(streams["stderr"]) == b"err\n"
        status = json.loads(await everything(streams["error"]))
    assert status["details"]["causes"][0]["message"] == "3"


@pytest.mark.parametrize("protocol", [V1, "v2.channel.k8s.io", "v3.channel.k8s.io"])
async def test_older_versions_say_it_in_words(rig: Rig, protocol: str) -> None:
    rig.pods.script = greet
    async with spdy(rig, spec(), protocol) as streams:
        assert b"exit status 3" in await everything(streams["error"])
        assert await everything(streams["stdout"]) == b"out\n"


@pytest.mark.parametrize("protocol", [V5, V4, V4_BASE64])
async def test_output_and_exit_code_over_websocket(rig: Rig, protocol: str) -> None:
    rig.pods.script = greet
    async with open_channels(rig.server.exec_url(spec()), [protocol], READABLE) as (session, chosen):
        assert chosen == protocol
        assert await everything((session, 1)) == b"out\n"
        assert await everything((session, 2)) == b"err\n"
        assert json.loads(await everything((session, 3)))["reason"] == "NonZeroExitCode"
        assert session.close_code == 1000


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
async def test_megabytes_both_ways_and_half_close(rig: Rig, transport: str) -> None:
    data = os.urandom(5_000_000)
    asked = spec(stdin=True, stderr=False)
    if transport == "spdy":
        async with spdy(rig, asked) as streams:

            async def feed() -> None:
                await streams["stdin"].write(data)
                await streams["stdin"].close_write()

            echoed, _ = await asyncio.gather(everything(streams["stdout"]), feed())
            status = json.loads(await everything(streams["error"]))
    else:
        async with open_channels(rig.server.exec_url(asked), [V5], READABLE) as (session, _):

            async def feed() -> None:
                await session.send(0, data)
                await session.close_channel(0)

            echoed, _ = await asyncio.gather(everything((session, 1)), feed())
            status = json.loads(await everything((session, 3)))
    assert hashlib.sha256(echoed).digest() == hashlib.sha256(data).digest()
    assert status["status"] == "Success"


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
async def test_a_terminal_has_sizes(rig: Rig, transport: str) -> None:
    seen: list[TerminalSize] = []

    async def script(process: FakeProcess) -> None:
        await process.resized.wait()
        seen.extend(process.sizes)
        await process.exit()

    rig.pods.script = script
    asked = spec(tty=True, stderr=False)
    size = TerminalSize(columns=100, rows=40)
    if transport == "spdy":
        async with spdy(rig, asked) as streams:
            await streams["resize"].write(encode_size(size))
            assert await everything(streams["stdout"]) == b""
    else:
        async with open_channels(rig.server.exec_url(asked), [V5], READABLE) as (session, _):
            await session.send(4, encode_size(size))
            assert await everything((session, 1)) == b""
    assert seen == [size]


@pytest.mark.parametrize("transport", ["spdy", "websocket"])
async def test_a_client_that_goes_kills_the_command(rig: Rig, transport: str) -> None:
    rig.pods.script = forever
    if transport == "spdy":
        async with spdy(rig, spec()):
            pass
    else:
        async with open_channels(rig.server.exec_url(spec()), [V5], READABLE):
            while not rig.pods.specs:
                await asyncio.sleep(0.01)
    await asyncio.wait_for(rig.pods.killed.wait(), 10)


async def test_a_client_that_vanishes_while_its_input_waits_kills_the_command(rig: Rig) -> None:
    rig.pods.script = forever
    url = rig.server.exec_url(spec(stdin=True))
    async with open_channels(url, [V5], READABLE) as (session, _):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await session.send(0, bytes(1_500_000))
                await asyncio.Event().wait()
        assert not rig.pods.killed.is_set()
        session._wire._writer.transport.abort()  # type: ignore[attr-defined]
        await asyncio.wait_for(rig.pods.killed.wait(), 10)


async def test_a_slow_client_slows_the_process_down(rig: Rig) -> None:
    written = 0

    async def script(process: FakeProcess) -> None:
        nonlocal written
        for _ in range(2000):
            await process.say(bytes(32768))
            written += 1
        await process.exit()

    rig.pods.script = script
    async with open_channels(rig.server.exec_url(spec()), [V5], READABLE) as (session, _):
        await asyncio.sleep(1)
        before = written
        await asyncio.sleep(0.3)
        assert written == before < 1000
        assert len(await everything((session, 1))) == 2000 * 32768


async def test_why_a_command_cannot_be_run_is_said(rig: Rig) -> None:
    async def script(process: FakeProcess) -> None:
        await process.exit(127, "no such program")

    rig.pods.script = script
    async with open_channels(rig.server.exec_url(spec()), [V5], READABLE) as (session, _):
        assert await everything((session, 2)) == b"no such program\n"
        assert json.loads(await everything((session, 3)))["details"]["causes"][0]["message"] == "127"


async def test_failures_of_the_runtime_are_told(rig: Rig) -> None:
    async def script(process: FakeProcess) -> None:
        await process.break_off(AgentGone("the VM is gone"))

    rig.pods.script = script
    async with spdy(rig, spec()) as streams:
        status = json.loads(await everything(streams["error"]))
    assert (status["reason"], "the VM is gone" in status["message"]) == ("InternalError", True)
    rig.pods.refuse = FailedPrecondition("the container is exited, not running")
    async with open_channels(rig.server.exec_url(spec()), [V5], READABLE) as (session, _):
        assert "not running" in json.loads(await everything((session, 3)))["message"]


async def test_attach(rig: Rig) -> None:
    asked = AttachSpec(container_id="c", stdin=True, stderr=False)
    async with open_channels(rig.server.attach_url(asked), [V5], READABLE) as (session, _):
        await session.send(0, b"hello")
        assert await session.read(1) == b"hello"
        await session.close_channel(0)
        assert json.loads(await everything((session, 3)))["status"] == "Success"
    assert rig.pods.specs == [asked]

    async def too_slow(process: FakeProcess) -> None:
        process.too_slow = True
        await process.exit()

    rig.pods.script = too_slow
    async with open_channels(rig.server.attach_url(asked), [V5], READABLE) as (session, _):
        assert "did not take the output" in json.loads(await everything((session, 3)))["message"]


async def test_streams_must_be_opened_in_time(rig: Rig) -> None:
    async with open_spdy(rig.server.exec_url(spec()), [V4]) as (session, _):
        await open_streams(session, "error", "stdout")
        await asyncio.wait_for(session.wait_gone(), 10)
    assert rig.pods.specs == []


async def test_streams_nobody_asked_for_are_refused(rig: Rig) -> None:
    async with open_spdy(rig.server.exec_url(spec(stdout=True, stderr=False)), [V4]) as (session, _):
        await open_streams(session, "error")
        for kind in ("stdin", "what", "error"):
            with contextlib.suppress(ClientGone):  # the reset may come together with the answer
                stream = await session.open({"streamtype": kind})
                await asyncio.wait_for(stream.wait_reset(), 10)
        assert rig.pods.specs == []
        await open_streams(session, "stdout")
        while not rig.pods.specs:
            await asyncio.sleep(0.01)


async def test_an_idle_session_is_ended(rig: Rig) -> None:
    rig.server._idle_timeout = 0.2
    rig.pods.script = forever
    async with spdy(rig, spec()):
        await asyncio.wait_for(rig.pods.killed.wait(), 10)


async def test_the_server_stops_with_sessions_open(rig: Rig) -> None:
    rig.pods.script = forever
    async with open_channels(rig.server.exec_url(spec()), [V5], READABLE) as (session, _):
        while not rig.pods.specs:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(rig.server.stop(), 10)
        await asyncio.wait_for(session.wait_gone(), 10)
    assert rig.pods.killed.is_set()


async def test_a_refusal_has_the_servers_words(rig: Rig) -> None:
    with pytest.raises(Unavailable, match=r"403.*no protocol in common.*v4\.channel"):
        async with open_channels(rig.server.exec_url(spec()), ["v9.channel.k8s.io"], READABLE):
            pass
