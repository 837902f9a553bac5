"""Why a call into a sandbox was cut off: mostly because its VM ended, which is known a moment later, or is held."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.errors import Code
from vmruntime.hypervisor.errors import VmGone, VmHeld
from vmruntime.sandboxes.interface import RunningSandbox

MOMENT = 2.0


@contextlib.asynccontextmanager
async def vm_end_told(running: RunningSandbox) -> AsyncIterator[None]:
    """Let a body talk to a sandbox; if that breaks off because the VM ended or is held, say so.

    Raises:
        VmHeld: The VM is held: at once, and not when a time is up.
        AgentGone: With the reason of the VM's end, if it has ended, else as the body raised it.
        VmGone: As the body raised it, from a VM that has not ended.
    """
    check_not_held(running)
    try:
        yield
    except (AgentGone, VmGone) as error:
        reason = await end_of(running)
        if reason is None:
            raise
        raise AgentGone(f"the pod's VM ended meanwhile: {reason}") from error
    except AgentError as error:
        if error.code is Code.DEADLINE_EXCEEDED:
            check_not_held(running)
        raise


def check_not_held(running: RunningSandbox) -> None:
    """Refuse to wait for a guest that does not run.

    Raises:
        VmHeld: The VM is held.
    """
    if running.held:
        raise VmHeld(running.held)


async def end_of(running: RunningSandbox) -> str | None:
    """Return why a sandbox has ended, waiting a moment for it; None: it goes on, only its agent was not reached."""
    try:
        async with asyncio.timeout(MOMENT):
            return await running.wait()
    except TimeoutError:
        return None
