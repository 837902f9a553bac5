"""What whole pods use: in the guest by its agent, on the host by its cgroup."""

from __future__ import annotations

import asyncio

import structlog

from vmruntime.agent.errors import AgentError
from vmruntime.errors import VmruntimeError
from vmruntime.model.stats import SandboxUsage
from vmruntime.pods.context import Context

log = structlog.get_logger(__name__)

AT_ONCE = 16


async def sandbox_usage(context: Context, sandbox_ids: list[str]) -> list[SandboxUsage]:
    """Measure ready sandboxes, several at once; one that does not answer is left out."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(sandbox_id: str) -> SandboxUsage | None:
        async with turn:
            return await _measure(context, sandbox_id)

    found = await asyncio.gather(*(one(sandbox_id) for sandbox_id in sandbox_ids))
    return [usage for usage in found if usage is not None]


async def _measure(context: Context, sandbox_id: str) -> SandboxUsage | None:
    live = context.live.get(sandbox_id)
    if live is None:
        return None
    try:
        sandbox = context.registry.sandbox(sandbox_id)
        guest = await live.running.agent.stats([])
        host = await context.backend(sandbox).usage(sandbox)
    except (AgentError, VmruntimeError) as error:
        log.debug("sandbox not measured", sandbox=sandbox_id, error=str(error))
        return None
    return SandboxUsage(id=sandbox_id, time=context.clock.now_ns(), host=host, guest=guest)
