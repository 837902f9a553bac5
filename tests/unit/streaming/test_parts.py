"""Tokens, statuses, terminal sizes, bounded pipes."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.streaming.test_spdy_codec import cut
from vmruntime.errors import ResourceExhausted
from vmruntime.model.streams import ExecEnd, ExecSpec, PortForwardSpec, TerminalSize
from vmruntime.streaming import status
from vmruntime.streaming.errors import ClientGone
from vmruntime.streaming.pipe import Budget, Pipe, wait_room
from vmruntime.streaming.sizes import SizeDecoder, encode_size
from vmruntime.streaming.tokens import IN_FLIGHT, LIFETIME, Tokens


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def now_ns(self) -> int:
        return 0


def test_a_token_works_once() -> None:
    tokens = Tokens(Clock())
    spec = ExecSpec(container_id="c", argv=["x"])
    token = tokens.issue(spec)
    assert tokens.redeem("guess") is None
    assert tokens.redeem(token) == spec
    assert tokens.redeem(token) is None


def test_a_token_works_for_a_minute() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    early, late = tokens.issue(PortForwardSpec(sandbox_id="a")), tokens.issue(PortForwardSpec(sandbox_id="b"))
    clock.now = LIFETIME - 0.1
    assert tokens.redeem(early) is not None
    clock.now = LIFETIME
    assert tokens.redeem(late) is None


def test_only_so_many_tokens() -> None:
    clock = Clock()
    tokens = Tokens(clock)
    issued = {tokens.issue(PortForwardSpec(sandbox_id="a")) for _ in range(IN_FLIGHT)}
    assert len(issued) == IN_FLIGHT
    with pytest.raises(ResourceExhausted):
        tokens.issue(PortForwardSpec(sandbox_id="a"))
    tokens.redeem(issued.pop())
    tokens.issue(PortForwardSpec(sandbox_id="a"))
    clock.now = LIFETIME
    for _ in range(IN_FLIGHT):
        tokens.issue(PortForwardSpec(sandbox_id="a"))


def test_statuses() -> None:
    exited = json.loads(status.exited("v4.channel.k8s.io", ExecEnd(exit_code=7)))
    assert (exited["status"], exited["reason"]) == ("Failure", "NonZeroExitCode")
    assert exited["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]
    assert json.loads(status.exited("v5.channel.k8s.io", ExecEnd(exit_code=0)))["status"] == "Success"
    assert status.exited("v3.channel.k8s.io", ExecEnd(exit_code=0)) == b""
    plain = status.exited("v2.channel.k8s.io", ExecEnd(exit_code=7))
    assert plain == b"command terminated with non-zero exit code: exit status 7"
    failed = json.loads(status.failed("v4.channel.k8s.io", "no"))
    assert (failed["reason"], failed["code"], "no" in failed["message"]) == ("InternalError", 500, True)
    assert b"no" in status.failed("channel.k8s.io", "no")


@given(st.lists(st.tuples(st.integers(1, 9999), st.integers(1, 9999)), max_size=5), st.lists(st.integers(0, 500)))
def test_sizes_survive_any_cut(pairs: list[tuple[int, int]], places: list[int]) -> None:
    sizes = [TerminalSize(columns=columns, rows=rows) for columns, rows in pairs]
    decoder = SizeDecoder()
    sent = b"\n".join(encode_size(size) for size in sizes)
    assert [size for chunk in cut(sent, places) for size in decoder.receive(chunk)] == sizes


@given(st.lists(st.binary(max_size=3000), max_size=10))
def test_what_is_no_size_is_skipped_and_not_kept(chunks: list[bytes]) -> None:
    decoder = SizeDecoder()
    for chunk in chunks:
        decoder.receive(chunk)
    assert len(decoder._buffer) <= 4096
    assert decoder.receive(b'}{"Width": 0, "Height": 5}{"Width": 3, "Height": 5}')[-1] == TerminalSize(
        columns=3, rows=5
    )


async def test_a_pipe_is_bounded_and_ends() -> None:
    pipe = Pipe(Budget(1000), limit=10)
    pipe.put(b"x" * 10)
    assert not pipe.has_room
    waiting = asyncio.ensure_future(pipe.wait_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await pipe.read() == b"x" * 10
    await asyncio.wait_for(waiting, 1)
    pipe.put(b"last")
    pipe.end()
    pipe.put(b"too late")
    assert [await pipe.read(), await pipe.read()] == [b"last", b""]


async def test_the_budget_counts_all_pipes_but_lets_an_empty_one_through() -> None:
    budget = Budget(10)
    one, other = Pipe(budget), Pipe(budget)
    one.put(b"x" * 10)
    assert not one.has_room
    assert other.has_room
    other.put(b"y")
    assert not other.has_room
    one.drop()
    assert (one.has_room, other.has_room, budget.used) == (True, True, 1)
    assert await one.read() == b""


async def test_a_writer_that_waits_notices_the_peers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmruntime.streaming.pipe.GONE_INTERVAL", 0.01)
    pipe = Pipe(Budget(1000), limit=1)
    pipe.put(b"x")
    with pytest.raises(ClientGone):
        await asyncio.wait_for(wait_room(pipe, lambda: True), 5)
