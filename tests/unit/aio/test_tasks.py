"""Background tasks: whatever keeps one from its first step, what it owns is closed and who waits for it is told."""

from __future__ import annotations

import asyncio

import pytest

from vmruntime.aio.tasks import Shared, TaskScope

PATIENCE = 20.0


async def test_a_closed_scope_closes_what_it_is_handed() -> None:
    scope = TaskScope("test")
    await scope.close()
    closed: list[str] = []
    with pytest.raises(RuntimeError, match="test is closed"):
        scope.start(asyncio.sleep(0), "late", owning=lambda: closed.append("late"))
    with pytest.raises(RuntimeError, match="test is closed"):
        await Shared(scope).run(lambda: asyncio.sleep(0), "later", owning=lambda: closed.append("later"))
    assert closed == ["late", "later"]


async def test_work_that_is_cancelled_before_its_first_step_is_not_waited_for() -> None:
    scope = TaskScope("test")
    closed: list[str] = []
    began: list[str] = []

    async def work() -> None:
        began.append("work")

    async def call() -> None:
        await Shared(scope).run(work, "work", owning=lambda: closed.append("work"))

    caller = asyncio.ensure_future(call())
    await asyncio.sleep(0)  # it has started the work, whose first step comes next
    closing = asyncio.ensure_future(scope.close())
    for task in scope._tasks:
        task.cancel()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(asyncio.CancelledError):
            await caller
        await closing
    assert (began, closed) == ([], ["work"])


async def test_shared_work_goes_on_without_its_caller() -> None:
    scope = TaskScope("test")
    go_on, done = asyncio.Event(), asyncio.Event()

    async def work() -> int:
        await go_on.wait()
        done.set()
        return 7

    caller = asyncio.ensure_future(Shared(scope).run(work, "work"))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait({caller})
    go_on.set()
    async with asyncio.timeout(PATIENCE):
        await done.wait()
        assert await Shared(scope).run(work, "again") == 7
    await scope.close()
