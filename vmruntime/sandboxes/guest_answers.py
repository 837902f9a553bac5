"""Whether a VM's guest answers yet, and what is known of one that does not."""

from __future__ import annotations

import asyncio

from vmruntime.agent.errors import AgentGone
from vmruntime.agent.relay import Dialer
from vmruntime.hypervisor.errors import VmHeld
from vmruntime.hypervisor.interface import VirtualMachine

DIAL_INTERVAL = 0.01
LAST_WORDS = 2.0
HELD_INTERVAL = 0.1
HELD_LOOKS = 50
"""Together long enough for a guest that is held to be tried again."""


async def until_not_held(vm: VirtualMachine) -> None:
    """Wait for a guest to run; dialling one that does not is what vhost-device-vsock 0.3 loses its way over.

    Raises:
        VmHeld: It does not, and is let go of.
    """
    try:
        for _ in range(HELD_LOOKS):
            if not vm.held:
                return
            await asyncio.sleep(HELD_INTERVAL)
    except BaseException:
        await vm.close()
        raise
    await vm.close()
    raise VmHeld(vm.held)


async def dial_until_answer(dialer: Dialer) -> None:
    """Connect until the agent listens. A connection made too early is refused, by the host or by the guest's kernel."""
    while True:
        try:
            connection = await dialer.dial()
        except (OSError, TimeoutError):
            await asyncio.sleep(DIAL_INTERVAL)
        else:
            connection.close()
            return


async def why_silent(vm: VirtualMachine, error: AgentGone) -> str:
    """Return why a guest's agent was heard of and does not answer: mostly its VM has just ended."""
    try:
        async with asyncio.timeout(LAST_WORDS):
            return await vm.wait()
    except TimeoutError:
        return f"its agent listens but does not answer: {error.message}"


def console_words(vm: VirtualMachine) -> str:
    """Return what the console said last, as the end of a message."""
    tail = vm.console_tail()
    return f"; its console said:\n{tail}" if tail else "; its console said nothing"
