"""Work that goes on beside a block of code and ends with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any


@contextlib.asynccontextmanager
async def group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup that raises its first failure as itself and not in a group, and leaves its task as it was.

    Python 3.11's TaskGroup asks its own task to end when a part of it fails, and forgets to take that back: the next
    asyncio.timeout() of the task to run out would then end the task.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        async with asyncio.TaskGroup() as made:
            yield made
    except BaseExceptionGroup as errors:
        while task.cancelling() > before:
            task.uncancel()
        raise first(errors) from None


@contextlib.asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` while the block runs; what still runs at its end is cancelled.

    A failure of any of it cancels the block and is raised in its place, as itself and not in a group.
    """
    async with group() as made:
        tasks = [made.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Run all of `work` to its end; the first failure cancels the rest and is raised as itself."""
    async with group() as made:
        for one in work:
            made.create_task(one)


def first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return a group's first error that is none itself."""
    error = errors.exceptions[0]
    return first(error) if isinstance(error, BaseExceptionGroup) else error
