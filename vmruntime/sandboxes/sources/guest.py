"""A guest that is up: its VM and the connection to its agent."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from vmruntime import tracing
from vmruntime.agent.client import AgentClient
from vmruntime.agent.errors import AgentGone
from vmruntime.agent.interface import AGENT_PORT, AgentHello
from vmruntime.agent.relay import Dialer, HybridDialer, Relay, VsockDialer
from vmruntime.hypervisor.errors import BootFailed
from vmruntime.hypervisor.interface import VirtualMachine, VmHandle
from vmruntime.sandboxes.guest_answers import console_words, dial_until_answer, why_silent

READY_LINE = "vmruntime-agent: ready"
"""The agent says on the console that it listens."""

CONNECTED_LINE = "vmruntime-agent: connected"
"""It says that a vsock was plugged in: now it can be reached."""


@dataclasses.dataclass
class Guest:
    """A guest whose agent answers.

    Attributes:
        attached: Serials of its disks.
        phases: Milliseconds that each step of its start took.
        source: Where it came from: cold, template or warm; empty: an earlier daemon had it.
    """

    vm: VirtualMachine
    relay: Relay
    agent: AgentClient
    hello: AgentHello
    attached: set[str]
    phases: dict[str, float]
    source: str = ""

    async def close(self) -> None:
        """Disconnect; the VM goes on."""
        await self.agent.close()
        await self.relay.close()
        await self.vm.close()


async def reach(
    vm: VirtualMachine,
    announced: str,
    timeout: float,
    phases: dict[str, float],
    source: str = "",
    usable: Callable[[], Awaitable[None]] | None = None,
    hello: AgentHello | None = None,
) -> Guest:
    """Wait for a guest's agent and connect to it; the VM is let go of when that fails.

    A guest is dialled only when its console says that the agent can be reached: vhost-device-vsock 0.3 can lose its way
    over connections that are made, and given up, before the guest's driver is there.

    Args:
        vm: The VM.
        announced: The line for which to wait; empty: the guest was up before.
        timeout: Seconds.
        phases: Gets how long it took.
        source: See Guest.
        usable: Waits until the vsock may be used, once the line has come; None: it may.
        hello: What its agent is known to say; None: it is asked.

    Raises:
        BootFailed: The agent does not answer; the message has the end of the console.
    """
    began = time.monotonic()
    dialer = _dialer(vm.handle)
    socket = Path(vm.handle.directory) / "agent.sock"
    relay = Relay(socket, dialer)

    async def answering() -> None:
        if announced:
            with tracing.span("vm.announced"):
                await vm.wait_for_console(announced)
        if usable is not None:
            await usable()
        if hello is None:
            with tracing.span("vm.dial"):
                await dial_until_answer(dialer)

    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(vm.close)
        undo.push_async_callback(relay.close)
        try:
            await unless_it_ends(vm, answering, timeout)
            await relay.open()
            agent = AgentClient(socket)
            undo.push_async_callback(agent.close)
            if hello is None:
                hello = await _hello(vm, agent, timeout)
            else:
                with tracing.span("vm.connect"):
                    await unless_it_ends(vm, agent.connect, timeout)
            attached = await vm.attached_disks()
        except AgentGone as error:  # asked now: a VM that is closed notices no end any more
            raise BootFailed(f"the guest did not come up: {await why_silent(vm, error)}{console_words(vm)}") from error
        undo.pop_all()
    phases["guest"] = (time.monotonic() - began) * 1000
    return Guest(vm=vm, relay=relay, agent=agent, hello=hello, attached=attached, phases=phases, source=source)


async def _hello(vm: VirtualMachine, agent: AgentClient, timeout: float) -> AgentHello:
    """Ask the agent who it is.

    Raises:
        BootFailed: It does not say so in time.
    """
    try:
        with tracing.span("vm.hello"):
            async with asyncio.timeout(timeout):
                return await agent.hello()
    except TimeoutError:
        raise BootFailed(f"the guest's agent listens but does not answer{console_words(vm)}") from None


async def unless_it_ends(vm: VirtualMachine, waiting: Callable[[], Awaitable[None]], timeout: float) -> None:
    """Wait for something of a guest.

    Raises:
        BootFailed: The VM ended instead, or the time is up.
    """
    ended = asyncio.ensure_future(vm.wait())
    answered = asyncio.ensure_future(waiting())
    try:
        async with asyncio.timeout(timeout):
            await asyncio.wait({ended, answered}, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise BootFailed(f"the guest did not come up: {ended.result()}{console_words(vm)}")
        answered.result()
    except TimeoutError:
        raise BootFailed(
            f"the guest's agent did not answer within {timeout:g} s{console_words(vm)}",
            remedy="hypervisor.boot_timeout allows longer; vmruntime doctor checks the guest's files",
        ) from None
    finally:
        for task in (ended, answered):
            task.cancel()
        await asyncio.wait({ended, answered})


def _dialer(handle: VmHandle) -> Dialer:
    if handle.vsock:
        return HybridDialer(Path(handle.vsock), AGENT_PORT)
    return VsockDialer(handle.cid, AGENT_PORT)
