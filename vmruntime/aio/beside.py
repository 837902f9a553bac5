"""Work that goes on beside a block of code and ends with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any


@contextlib.asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` while the block runs; what still runs at its end is cancelled.

    A failure of any of it cancels the block and is raised in its place, as itself and not in a group.
    """
    with _left_as_it_was():
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one) for one in work]
                try:
                    yield
                finally:
                    for task in tasks:
                        task.cancel()
        except BaseExceptionGroup as errors:
            raise first(errors) from None


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Run all of `work` to its end; the first failure cancels the rest and is raised as itself."""
    with _left_as_it_was():
        try:
            async with asyncio.TaskGroup() as group:
                for one in work:
                    group.create_task(one)
        except BaseExceptionGroup as errors:
            raise first(errors) from None


@contextlib.contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Take back that a group asks its own task to end when a part of it fails.

    Python 3.11's TaskGroup forgets to; the next asyncio.timeout() of the task to run out would then end the task.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        yield
    except asyncio.CancelledError:
        raise
    except BaseException:
        while task.cancelling() > before:
            task.uncancel()
        raise


def first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return a group's first error that is none itself."""
    error = errors.exceptions[0]
    return first(error) if isinstance(error, BaseExceptionGroup) else error
