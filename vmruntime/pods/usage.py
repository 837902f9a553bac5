"""What pods and containers use: in the guest by its agent, for whole pods also on the host by their cgroup.

A guest may be slow, lie or end: whatever it does, only its own pod is missing in the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import structlog

from vmruntime.errors import VmruntimeError
from vmruntime.model.container import ContainerState
from vmruntime.model.stats import ContainerUsage, SandboxUsage
from vmruntime.pods.context import Context, Live

log = structlog.get_logger(__name__)

T = TypeVar("T")

AT_ONCE = 16


async def container_usage(context: Context, container_ids: list[str]) -> list[ContainerUsage]:
    """Measure running containers; those that ended meanwhile or whose sandbox does not answer are left out.

    Raises:
        NotFound: An id names no container.
    """
    wanted: dict[str, list[str]] = {}
    for container_id in container_ids:
        container = context.registry.container(container_id)
        if container.state is ContainerState.RUNNING:
            wanted.setdefault(container.sandbox_id, []).append(container_id)

    async def measure(sandbox_id: str, live: Live) -> list[ContainerUsage]:
        usage = await live.running.agent.stats(wanted[sandbox_id])
        return [one for one in usage.containers if one.id in wanted[sandbox_id]]

    return [usage for found in await _each(context, wanted, measure) for usage in found]


async def sandbox_usage(context: Context, sandbox_ids: list[str]) -> list[SandboxUsage]:
    """Measure ready sandboxes; one that does not answer is left out."""

    async def measure(sandbox_id: str, live: Live) -> SandboxUsage:
        sandbox = context.registry.sandbox(sandbox_id)
        guest = await live.running.agent.stats([])
        host = await context.backend(sandbox).usage(sandbox)
        return SandboxUsage(id=sandbox_id, time=context.clock.now_ns(), host=host, guest=guest)

    return await _each(context, sandbox_ids, measure)


async def _each(context: Context, sandbox_ids: Iterable[str], measure: Callable[[str, Live], Awaitable[T]]) -> list[T]:
    """Measure those sandboxes that run, several at once; without the ones that fail."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(sandbox_id: str) -> list[T]:
        async with turn:
            live = context.live.get(sandbox_id)
            if live is None:
                return []
            try:
                return [await measure(sandbox_id, live)]
            except VmruntimeError as error:
                log.info("sandbox not measured", sandbox=sandbox_id, error=str(error))
                return []

    found = await asyncio.gather(*(one(sandbox_id) for sandbox_id in sandbox_ids))
    return [usage for usages in found for usage in usages]
