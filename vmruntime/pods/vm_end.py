"""Why a call into a sandbox was cut off: mostly because its VM ended, which is known a moment later."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from vmruntime.agent.errors import AgentGone
from vmruntime.hypervisor.errors import VmGone
from vmruntime.sandboxes.interface import RunningSandbox

MOMENT = 2.0


@contextlib.asynccontextmanager
async def vm_end_told(running: RunningSandbox) -> AsyncIterator[None]:
    """Let a body talk to a sandbox; if that breaks off because the VM ended, say so.

    Raises:
        AgentGone: With the reason of the VM's end, if it has ended, else as the body raised it.
        VmGone: As the body raised it, from a VM that has not ended.
    """
    try:
        yield
    except (AgentGone, VmGone) as error:
        reason = await end_of(running)
        if reason is None:
            raise
        raise AgentGone(f"the pod's VM ended meanwhile: {reason}") from error


async def end_of(running: RunningSandbox) -> str | None:
    """Return why a sandbox has ended, waiting a moment for it; None: it goes on, only its agent was not reached."""
    try:
        async with asyncio.timeout(MOMENT):
            return await running.wait()
    except TimeoutError:
        return None
