"""The agent of an image pod: no program of ours, but what the hypervisor, the serial console and QEMU's guest agent offer.

It speaks the language of agent.interface.Agent, so that everything above needs to know of one kind of pod only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import structlog

from vmruntime import __version__
from vmruntime.agent.interface import (
    AgentHello,
    AttachStream,
    ExecOutput,
    ExecStream,
    GuestContainer,
    GuestContainerState,
    GuestSetup,
    OutputReader,
    PortDialer,
)
from vmruntime.errors import Internal, VmruntimeError
from vmruntime.hypervisor.interface import VirtualMachine
from vmruntime.model.container import ContainerUser
from vmruntime.model.stats import GuestUsage
from vmruntime.model.streams import AttachSpec, ExecSpec
from vmruntime.sandboxes.image_vm.console import Console
from vmruntime.sandboxes.image_vm.exec import GuestCommands
from vmruntime.sandboxes.image_vm.guest_link import GuestLink
from vmruntime.sandboxes.image_vm.machine import ImageMachine
from vmruntime.sandboxes.image_vm.ports import MachinePorts
from vmruntime.sandboxes.image_vm.prepare import Definer
from vmruntime.sandboxes.image_vm.usage import interface_usage, machine_usage, sandbox_usage
from vmruntime.sandboxes.size import MIB

log = structlog.get_logger(__name__)

ROOT = ContainerUser(uid=0, gid=0)
NOTICED_SECONDS, NOTICED_INTERVAL = 5.0, 0.2
"""What a guest may take to notice processors that were plugged in, and how often it is asked."""


class ImageAgent:
    """Implements agent.interface.Agent for one pod."""

    def __init__(self, machine: ImageMachine, definer: Definer) -> None:
        self._machine = machine
        self._definer = definer
        self._console = Console(machine.directory)
        self._link = GuestLink(machine.directory)
        self._exec = GuestCommands(self._link)

    async def hello(self) -> AgentHello:
        """Return who answers: nobody of the guest."""
        return AgentHello(
            version=__version__, kernel="", sandbox_id=self._machine.sandbox.id, uptime_us=0, started_us=0
        )

    async def setup(self, setup: GuestSetup) -> None:
        """Do nothing: the guest is told by cloud-init, when it boots."""

    async def prepare(self, entropy: bytes, scratch_serial: str, oci_spec: bytes) -> None:
        """Raise: nobody keeps image pods' machines ready."""
        raise Internal("an image pod was asked to prepare")

    async def create(self, container: GuestContainer) -> tuple[int, ContainerUser]:
        """Make the machine's disks and write down what it is made of."""
        if container.machine is None:
            raise Internal("an image pod was asked to create a container without a machine")
        await self._machine.define(await self._definer.define(container.id, container.machine))
        return 0, ROOT

    async def start(self, container_id: str) -> int:
        """Start the machine; the guest boots from now on."""
        return await self._machine.start(container_id)

    async def signal(self, container_id: str, signal: int, *, everyone: bool = False) -> None:
        """Press the power button until the guest is off; SIGKILL ends the machine."""
        await self._machine.signal(container_id, signal)

    async def delete(self, container_id: str) -> list[str]:
        """End the machine and forget it; the pod's disk stays for the next container."""
        await self._machine.forget(container_id)
        return []

    async def containers(self) -> list[GuestContainerState]:
        """Return the container, if there is one."""
        state = self._machine.state()
        return [state] if state is not None else []

    def events(self) -> AsyncIterator[GuestContainerState]:
        """Iterate over the container's state, then over its changes."""
        return self._machine.events()

    def output(self, container_id: str, after_seq: int) -> AbstractAsyncContextManager[OutputReader]:
        """Read the serial console."""
        return self._machine.console(container_id).output(after_seq)

    async def exec_sync(self, container_id: str, argv: list[str], timeout: float, limit: int) -> ExecOutput:
        """Run a command by the guest's QEMU guest agent."""
        self._machine.running(container_id)
        return await self._exec.exec_sync(argv, timeout, limit)

    def exec(self, spec: ExecSpec) -> AbstractAsyncContextManager[ExecStream]:
        """Run a command by the guest's QEMU guest agent."""
        self._machine.running(spec.container_id)
        return self._exec.exec(spec)

    def attach(self, spec: AttachSpec) -> AbstractAsyncContextManager[AttachStream]:
        """Join the serial console."""
        self._machine.running(spec.container_id)
        return self._console.attach(spec)

    def ports(self) -> AbstractAsyncContextManager[PortDialer]:
        """Open the way to the pod's addresses."""
        network = self._machine.sandbox.network
        return contextlib.nullcontext(MachinePorts(network.ips if network is not None else []))

    async def stats(self, container_ids: list[str]) -> GuestUsage:
        """Measure the machine from the host."""
        machine, parts = self._machine, self._machine.parts
        vm, defined, now = machine.vm, machine.definition, self._machine.parts.clock.now_ns()
        memory = await vm.balloon_stats() if vm is not None else {}
        found = []
        if vm is not None and defined is not None and defined.container_id in (container_ids or [defined.container_id]):
            host = await parts.owned.cgroups.usage(await parts.owned.cgroup_of(machine.sandbox.id))
            root = machine.disks / "root.qcow2"
            size = defined.size.memory_mib * MIB
            found.append(machine_usage(defined.container_id, now, host, memory, size, root))
        return sandbox_usage(now, found, await interface_usage(machine.sandbox.network), memory)

    async def update(self, container_id: str, resources: bytes) -> None:
        """Do nothing: the machine's size is what limits it, and RunningSandbox.resize() changes that."""

    async def online_cpus(self, count: int) -> None:
        """Have the guest use processors and memory that were plugged in; most guests do so by themselves."""
        with contextlib.suppress(VmruntimeError, TimeoutError):  # the guest has no agent, or one that cannot
            agent = await self._link.agent()
            async with asyncio.timeout(NOTICED_SECONDS):
                while (noticed := await agent.bring_online()) is not None and noticed < count:  # noqa: ASYNC110
                    await asyncio.sleep(NOTICED_INTERVAL)

    async def shutdown(self, grace: float) -> None:
        """Have the guest power off within some seconds, else end it."""
        await self._machine.shut_down(grace)

    async def close(self) -> None:
        """Let go of console and guest agent."""
        await self._link.close()

    def vm(self, container_id: str) -> VirtualMachine:
        """Return the VM of a running container; AgentError says why there is none."""
        return self._machine.running(container_id)
