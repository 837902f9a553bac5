"""The channel to guest agents: honest ones, slow ones, and others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.qga.fake_agent import NOTHING, FakeAgent, connected
from vmruntime.qga import channel, wire
from vmruntime.qga.channel import Channel
from vmruntime.qga.client import GuestAgent
from vmruntime.qga.errors import QgaError, QgaGone, QgaLied, QgaSilent, QgaUnsupported

Pair = tuple[GuestAgent, FakeAgent]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with connected() as both:
        yield both


async def test_one_synchronisation_and_then_calls(pair: Pair) -> None:
    agent, fake = pair
    for _ in range(3):
        await agent.ping()
    assert fake.calls == [("guest-ping", {})] * 3
    assert fake.syncs == 1


async def test_what_is_stale_is_passed_over(pair: Pair) -> None:
    agent, fake = pair
    fake.writer.write(b'{"return": 1}\nhalf an ans' + bytes(range(256)) + b'\xff{"return": 99}\n{"retu')
    await agent.ping()
    assert fake.syncs == 1


async def test_an_answer_that_comes_too_late_is_nobodys(pair: Pair) -> None:
    agent, fake = pair
    late = asyncio.Event()

    async def slow(_: dict[str, Any]) -> dict[str, Any]:
        await late.wait()
        return {"version": "late", "supported_commands": []}

    fake.answers["guest-info"] = slow
    with pytest.raises(QgaSilent, match="no QEMU guest agent answered guest-info within 0.05 s"):
        await agent._channel.call("guest-info", timeout=0.05)
    late.set()
    fake.answers["guest-get-fsinfo"] = []
    assert await agent.filesystems() == []
    assert fake.syncs == 2


async def test_an_answer_to_a_cancelled_caller_is_nobodys(pair: Pair) -> None:
    agent, fake = pair
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_: dict[str, Any]) -> list[Any]:
        asked.set()
        await go_on.wait()
        return [{"name": "stale", "mountpoint": "/", "type": "ext4"}]

    fake.answers["guest-get-fsinfo"] = slow
    caller = asyncio.ensure_future(agent.filesystems())
    await asked.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    fake.answers["guest-get-fsinfo"] = []
    go_on.set()
    assert await agent.filesystems() == []


async def test_callers_take_turns(pair: Pair) -> None:
    agent, fake = pair

    async def echo(arguments: dict[str, Any]) -> object:
        await asyncio.sleep(0)
        return arguments["n"]

    fake.answers["guest-echo"] = echo
    numbers = list(range(50))
    assert await asyncio.gather(*(agent._channel.call("guest-echo", {"n": n}, timeout=10) for n in numbers)) == numbers


async def test_who_waits_for_a_turn_waits_no_longer_than_said(pair: Pair) -> None:
    agent, fake = pair
    fake.listening.clear()
    first = asyncio.ensure_future(agent.ping(5))
    await asyncio.sleep(0)
    with pytest.raises(QgaSilent, match=r"within 0\.05 s"):
        await agent.ping(0.05)
    fake.listening.set()
    await first


async def test_an_agent_that_comes_up_later(pair: Pair) -> None:
    agent, fake = pair
    fake.listening.clear()
    waiting = asyncio.ensure_future(agent.wait(30))
    await asyncio.sleep(0.6)  # several attempts get lost, or are answered all at once
    assert not waiting.done()
    fake.listening.set()
    await waiting
    assert fake.syncs > 1
    fake.answers["guest-get-fsinfo"] = []
    assert await agent.filesystems() == []


async def test_no_agent(pair: Pair) -> None:
    agent, fake = pair
    fake.listening.clear()
    with pytest.raises(
        QgaSilent,
        match=r"within 0\.3 s; the guest may still be starting, or has none \(install and enable it in the guest: apt install qemu-guest-agent",
    ):
        await agent.wait(0.3)


async def test_refusals(pair: Pair) -> None:
    agent, fake = pair
    fake.answers["guest-get-fsinfo"] = RuntimeError("no\x1b[31m such\nthing" + "!" * 10000)
    with pytest.raises(QgaError) as refusal:
        await agent.filesystems()
    assert str(refusal.value).startswith("the QEMU guest agent refuses guest-get-fsinfo: no [31m such thing!!!")
    assert len(str(refusal.value)) < 600
    with pytest.raises(QgaUnsupported, match="does not do guest-network-get-interfaces"):
        await agent.interfaces()
    fake.answers["guest-get-fsinfo"] = RuntimeError("The command guest-get-fsinfo has been disabled for this instance")
    with pytest.raises(QgaUnsupported, match="block-rpcs and allow-rpcs"):
        await agent.filesystems()
    assert fake.syncs == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\n",
        b"[]\n",
        b"{}\n",
        b'{"error": "x"}\n',
        b"\xfe\n",
        b'{"return": \n',
        b"[" * 5000 + b"]" * 5000 + b"\n",
    ],
)
async def test_answers_that_are_none(pair: Pair, answer: bytes) -> None:
    agent, fake = pair
    fake.answers["guest-ping"] = answer
    with pytest.raises(QgaLied, match="the QEMU guest agent broke the protocol: the answer to guest-ping is"):
        await agent.ping()
    fake.answers["guest-ping"] = {}
    await agent.ping()
    assert fake.syncs == 2


async def test_answers_without_end(pair: Pair) -> None:
    agent, fake = pair

    async def flood(_: dict[str, Any]) -> object:
        while True:
            fake.writer.write(b"x" * 65536)
            await fake.writer.drain()

    fake.answers["guest-ping"] = flood
    with pytest.raises(QgaLied, match="an answer is longer than 1048576 bytes"):
        await agent.ping()
    with pytest.raises(QgaGone):  # it is not listened to any more
        await agent.ping()


async def test_a_flood_instead_of_a_beginning(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "STALE_LIMIT", 1024 * 1024)
    agent, fake = pair

    async def flood() -> None:
        while True:
            fake.writer.write(b'{"return": {}}\n' * 1000)
            await fake.writer.drain()

    fake.listening.clear()
    task = asyncio.ensure_future(flood())
    with pytest.raises(QgaLied, match="it sends more than 1048576 bytes and does not answer"):
        await agent.ping()
    with pytest.raises(ConnectionError):
        await task


async def test_sentinels_that_come_one_by_one(pair: Pair) -> None:
    agent, fake = pair
    fake.answers["guest-sync-delimited"] = b"\xff"
    with pytest.raises(QgaSilent):
        await agent.ping(0.1)
    del fake.answers["guest-sync-delimited"]
    fake.listening.clear()
    asking = asyncio.ensure_future(agent.ping(5))
    for _ in range(3):
        fake.writer.write(b"\xff")
        await asyncio.sleep(0.05)
    fake.listening.set()
    await asking


@pytest.mark.parametrize(
    "sync", [b"\xff" * 10000, b'\xff{"return": 5}\n', b"\xff\n\xff\n", b"\xffnonsense\n", b'{"return": 5}\n', b""]
)
async def test_a_beginning_that_is_not_ours(pair: Pair, sync: bytes) -> None:
    agent, fake = pair
    fake.answers["guest-sync-delimited"] = sync
    with pytest.raises((QgaSilent, QgaLied)):
        await agent.ping(0.1)
    del fake.answers["guest-sync-delimited"]
    await agent.ping()


async def test_the_end_of_the_vm(pair: Pair) -> None:
    agent, fake = pair
    await agent.ping()

    def vanish(_: dict[str, Any]) -> object:
        fake.writer.transport.abort()
        return NOTHING

    fake.answers["guest-ping"] = vanish
    for _ in range(2):
        with pytest.raises(QgaGone, match="the channel to the QEMU guest agent is closed"):
            await agent.ping()


async def test_a_closed_channel(pair: Pair) -> None:
    agent, _ = pair
    await agent.close()
    with pytest.raises(QgaGone):
        await agent.ping()


async def test_a_guest_that_does_not_read(pair: Pair) -> None:
    agent, fake = pair
    fake.listening.clear()
    with pytest.raises(QgaSilent):
        await agent._channel.call("guest-exec", {"input-data": "x" * 16 * 1024 * 1024}, timeout=0.2)


async def test_connect(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await FakeAgent(reader, writer).serve()
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "socket"):
        agent = GuestAgent(await Channel.connect(tmp_path / "socket"))
        await agent.ping()
        await agent.close()
    with pytest.raises(QgaGone):
        await Channel.connect(tmp_path / "absent")


@given(st.lists(st.binary(max_size=40), max_size=10), st.integers(1, 7))
def test_lines_however_they_arrive(lines: list[bytes], step: int) -> None:
    lines = [line.replace(b"\n", b"") for line in lines]
    stream = b"".join(line + b"\n" for line in lines)
    buffer, found = wire.Lines(), []
    for start in range(0, len(stream), step):
        buffer.feed(stream[start : start + step])
        while (line := buffer.next(40)) is not None:
            found.append(line)
    assert found == lines


@given(st.binary(max_size=100))
def test_any_bytes_are_an_answer_or_none(data: bytes) -> None:
    try:
        json.dumps(wire.result("guest-ping", data))
    except QgaError as error:
        assert error.message
