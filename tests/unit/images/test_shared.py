from __future__ import annotations

import asyncio

import pytest

from vmruntime.errors import NotFound
from vmruntime.images.shared import SharedWork


class Work:
    def __init__(self) -> None:
        self.runs = 0
        self.ended = 0
        self.gate = asyncio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        try:
            await self.gate.wait()
        finally:
            await asyncio.sleep(0)
            self.ended += 1
        return self.runs


async def test_once_for_all_and_again_later() -> None:
    shared: SharedWork[str, int] = SharedWork()
    work = Work()
    callers = [asyncio.ensure_future(shared.join("k", work)) for _ in range(3)]
    await asyncio.sleep(0)
    work.gate.set()
    assert await asyncio.gather(*callers) == [1, 1, 1]
    assert await shared.join("k", work) == 2


async def test_keys_do_not_share() -> None:
    shared: SharedWork[str, int] = SharedWork()
    work = Work()
    work.gate.set()
    await asyncio.gather(shared.join("a", work), shared.join("b", work))
    assert work.runs == 2


async def test_one_cancelled_caller_leaves_the_others() -> None:
    shared: SharedWork[str, int] = SharedWork()
    work = Work()
    first, second = (asyncio.ensure_future(shared.join("k", work)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    work.gate.set()
    assert await second == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
async def test_the_last_cancelled_caller_ends_the_work(steps: int) -> None:
    shared: SharedWork[str, int] = SharedWork()
    work = Work()
    callers = [asyncio.ensure_future(shared.join("k", work)) for _ in range(2)]
    for _ in range(steps):
        await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    assert all(caller.cancelled() for caller in callers)
    assert work.ended == work.runs
    work.gate.set()
    assert await shared.join("k", work) == work.runs


async def test_failure_reaches_all() -> None:
    shared: SharedWork[str, int] = SharedWork()

    async def fail() -> int:
        await asyncio.sleep(0)
        raise NotFound("gone")

    outcomes = await asyncio.gather(*(shared.join("k", fail) for _ in range(3)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["gone"] * 3
