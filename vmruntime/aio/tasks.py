"""Background tasks whose owner is an object with open() and close(), not a block of code.

asyncio.TaskGroup is right wherever a block waits for its tasks. A running VM's console reader or a container's log pump
lives from one request to another instead; its owner holds a TaskScope and closes it. This is the one place that calls
create_task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from vmruntime import tracing

log = structlog.get_logger(__name__)


class TaskScope:
    """Tasks that end, at the latest, when the scope is closed. A task that fails is logged, not lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(
        self, work: Coroutine[Any, Any, None], name: str, *, owning: Callable[[], object] | None = None
    ) -> asyncio.Task[None]:
        """Run `work` in the background until it ends or the scope is closed.

        Args:
            work: What to run.
            name: Of the task, for the log.
            owning: Closes what was handed to `work`; called when it has ended, also when it never got to its first step
                and so could close nothing itself: it was cancelled, or the scope is closed.

        Raises:
            RuntimeError: The scope is closed.
        """
        if self._closed:
            work.close()
            if owning is not None:
                owning()
            raise RuntimeError(f"the scope {self._name} is closed")
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        if owning is not None:
            task.add_done_callback(lambda _: owning())
        return task

    async def close(self) -> None:
        """Cancel what still runs and wait until it has ended."""
        self._closed = True
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", task=task.get_name(), exc_info=error)


class Shared:
    """Work that several callers wait for and that no single caller's going away cancels."""

    def __init__(self, scope: TaskScope) -> None:
        self._scope = scope

    async def run(
        self, work: Callable[[], Coroutine[Any, Any, Any]], name: str, *, owning: Callable[[], object] | None = None
    ) -> Any:
        """Run `work` to its end even if the caller is cancelled; return its result or raise its error.

        Args:
            work: What to run.
            name: Of its task, for the log.
            owning: As of TaskScope.start().

        Raises:
            asyncio.CancelledError: The caller was cancelled, or the scope was closed.
            RuntimeError: The scope is closed already.
        """
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def carry() -> None:
            try:
                with tracing.outliving():
                    result = await work()
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                if not outcome.cancelled():
                    outcome.set_exception(error)
                    outcome.exception()  # seen: the caller may be gone
            else:
                if not outcome.cancelled():
                    outcome.set_result(result)

        task = self._scope.start(carry(), name, owning=owning)
        # Also when it was cancelled before its first step: the caller must not wait for ever.
        task.add_done_callback(lambda _: outcome.cancel())
        return await asyncio.shield(outcome)
