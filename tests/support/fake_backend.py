"""Sandboxes in memory: one layer below the use cases of pods, and nothing below that.

A FakeMachine is a sandbox as the world has it; it outlives the daemon's FakeSandbox. Faults are ordered by "sandbox." and
the method's name, and by "sandbox.METHOD done" for an answer that gets lost; those inside the guest by agent.fake's names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence

from vmruntime.agent.errors import AgentError
from vmruntime.agent.fake import FakeAgent, FakeGuest
from vmruntime.agent.interface import AgentHello, GuestDevice
from vmruntime.aio.faults import Faults
from vmruntime.config.settings import GuestSettings
from vmruntime.hypervisor.errors import VmGone
from vmruntime.model.container import Device, Mount
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.resources import LinuxResources, VmSize
from vmruntime.model.sandbox import NetworkInterface, Sandbox
from vmruntime.model.stats import HostUsage
from vmruntime.sandboxes.interface import LayerDisk, Published, RecordSerials, VolumeSource
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.sandboxes.size import size_for

HOST_MEMORY_MIB = 16384


class FakeMachine:
    """A sandbox that runs.

    Attributes:
        cid: The number it was given; its resource in the ledger.
        layers: Serials of the layers that are plugged in.
        volumes: Mounts of each container that are visible.
        devices: Host paths of the block devices that are plugged in.
        nics: Names of its interfaces.
        size: What it was last resized to; None: never.
        reason: Why it ended; empty while it runs.
        held: Why it does not run for the time being.
    """

    def __init__(self, cid: int, faults: Faults, now_ns: Callable[[], int]) -> None:
        self.cid = cid
        self.layers: set[str] = set()
        self.volumes: dict[str, list[Mount]] = {}
        self.devices: set[str] = set()
        self.nics: list[str] = []
        self.size: VmSize | None = None
        self.reason = ""
        self.held = ""
        self.guest = FakeGuest(faults, disks=lambda: self.layers | {"scratch"}, now_ns=now_ns)
        self.guest.on_power_off = lambda: self.guest.start_task(self.end("the guest powered off"), "power off")

    async def end(self, reason: str) -> None:
        """End it, for whatever reason."""
        self.reason = self.reason or reason
        await self.guest.die()


class FakeSandbox:
    """A daemon's hold of a machine; implements sandboxes.interface.RunningSandbox.

    Attributes:
        closed: Whether it was let go of.
    """

    def __init__(self, machine: FakeMachine, faults: Faults, hello: AgentHello) -> None:
        self.machine = machine
        self.closed = False
        self._faults = faults
        self._hello = hello
        self._agent = FakeAgent(machine.guest)
        self._phases: dict[str, float] = {}

    @property
    def agent(self) -> FakeAgent:
        """The agent."""
        return self._agent

    @property
    def hello(self) -> AgentHello:
        """What the agent said first."""
        return self._hello

    @property
    def scratch_serial(self) -> str:
        """Serial of the writable disk."""
        return "scratch"

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds of each step."""
        return self._phases

    @property
    def source(self) -> str:
        """Nowhere."""
        return ""

    def facts(self) -> dict[str, str | int | bool]:
        """Return nothing."""
        return {}

    @property
    def held(self) -> str:
        """What the test put into the machine."""
        return self.machine.held

    def layer_name(self, serial: str) -> str:
        """Return the serial: the guest finds disks by it."""
        return serial

    async def attach_nic(self, nic: NetworkInterface, tap_fd: int) -> None:
        """Plug a NIC in."""
        await self._at("attach_nic")
        self.machine.nics.append(nic.name)
        await self._at("attach_nic done")

    async def attach_layers(self, layers: Sequence[LayerDisk]) -> None:
        """Plug layers in, one after the other."""
        for layer in layers:
            if layer.serial not in self.machine.layers:
                await self._at("attach_layers")
                assert layer.path.is_file()
                self.machine.layers.add(layer.serial)
        await self._at("attach_layers done")

    async def release_layers(self, serials: Sequence[str]) -> None:
        """Unplug layers."""
        await self._at("release_layers")
        self.machine.layers -= set(serials)
        await self._at("release_layers done")

    async def publish_volumes(self, container_id: str, mounts: Sequence[Mount]) -> Published:
        """Make mounts visible."""
        await self._at("publish_volumes")
        shown = [mount for mount in mounts if not mount.image]
        if shown:
            self.machine.volumes[container_id] = shown
        await self._at("publish_volumes done")
        sources = [
            VolumeSource(mount=mount, source=f"share:{container_id}/{number}", readonly=mount.readonly)
            for number, mount in enumerate(shown)
        ]
        return Published(sources=sources, share_tag="vmruntime" if shown else "")

    async def withdraw_volumes(self, container_id: str) -> None:
        """Take mounts away."""
        await self._at("withdraw_volumes")
        self.machine.volumes.pop(container_id, None)
        await self._at("withdraw_volumes done")

    async def attach_devices(self, devices: Sequence[Device], record: RecordSerials) -> list[GuestDevice]:
        """Plug devices in; a path that ends in /.. and a name is another name of the same device."""
        found = []
        if devices:
            await record([os.path.normpath(device.host_path) for device in devices])
        for device in devices:
            await self._at("attach_devices")
            serial = os.path.normpath(device.host_path)
            self.machine.devices.add(serial)
            found.append(GuestDevice(path=device.container_path, permissions=device.permissions, serial=serial))
        await self._at("attach_devices done")
        return found

    async def release_devices(self, unused: Callable[[], Sequence[str]]) -> None:
        """Unplug devices."""
        await self._at("release_devices")
        self.machine.devices -= set(unused())
        await self._at("release_devices done")

    async def resize(self, size: VmSize) -> None:
        """Note the size."""
        await self._at("resize")
        self.machine.size = size

    async def wait(self) -> str:
        """Wait for the end."""
        await self.machine.guest.died.wait()
        return self.machine.reason

    async def shut_down(self, grace: float) -> None:
        """Let the guest power off, then end it."""
        await self._faults.at("sandbox.shut_down")
        with contextlib.suppress(AgentError):
            await self._agent.shutdown(grace)
        await self.machine.end("ended by the host")

    async def close(self) -> None:
        """Let go."""
        self.closed = True
        await self._agent.close()

    async def _at(self, step: str) -> None:
        await self._faults.at(f"sandbox.{step}")
        if self.closed or self.machine.reason:
            raise VmGone("the fake sandbox is off, or was let go of")


class FakeBackend:
    """Implements sandboxes.interface.SandboxBackend.

    Attributes:
        faults: Of this daemon.
        machines: Every machine that was ever started, by sandbox id; adopt() finds them here.
        held: Every hold of one that was ever handed out.
    """

    def __init__(self, faults: Faults, now_ns: Callable[[], int]) -> None:
        self.faults = faults
        self.machines: dict[str, FakeMachine] = {}
        self.held: list[FakeSandbox] = []
        self._now_ns = now_ns
        self._owned: OwnedResources

    def serve(self, owned: OwnedResources, faults: Faults) -> None:
        """Belong to a daemon that has just started."""
        self._owned = owned
        self.faults = faults
        for machine in self.machines.values():
            machine.guest.faults = faults
        owned.add_releaser(ResourceKind.CID, self._end)

    @property
    def running(self) -> list[str]:
        """Ids of the sandboxes that run."""
        return [one for one, machine in self.machines.items() if not machine.reason]

    def size(self, sandbox: Sandbox, containers: Sequence[LinuxResources] = ()) -> VmSize:
        """Return the size a real VM would have."""
        return size_for(sandbox.spec, containers, GuestSettings(), HOST_MEMORY_MIB)

    async def usage(self, sandbox: Sandbox) -> HostUsage:
        """Return some usage."""
        await self.faults.at("sandbox.usage")
        return HostUsage(cpu_ns=1, memory_usage=2)

    async def start(self, sandbox: Sandbox) -> FakeSandbox:
        """Start a machine; on failure nothing of it is left."""
        try:
            await self.faults.at("sandbox.start")
            cid = await self._owned.ledger.allocate_cid(sandbox.id)
            await self.faults.at("sandbox.start recorded")
            self.machines[sandbox.id] = FakeMachine(cid, self.faults, self._now_ns)
            await self.faults.at("sandbox.start done")
            return await self._hold(self.machines[sandbox.id])
        except BaseException:
            await asyncio.shield(self.release(sandbox.id, final=True))
            raise

    async def adopt(self, sandbox: Sandbox) -> FakeSandbox:
        """Take over a machine of an earlier daemon."""
        await self.faults.at("sandbox.adopt")
        machine = self.machines.get(sandbox.id)
        if machine is None or machine.reason:
            raise VmGone("it ended while no daemon was running")
        return await self._hold(machine)

    async def release(self, sandbox_id: str, *, final: bool) -> None:
        """End a machine."""
        await self._owned.release(sandbox_id, keep=frozenset({ResourceKind.NETWORK}), final=final)

    async def _hold(self, machine: FakeMachine) -> FakeSandbox:
        hello = await FakeAgent(machine.guest).hello()
        self.held.append(FakeSandbox(machine, self.faults, hello))
        return self.held[-1]

    async def _end(self, resource: Resource) -> None:
        await self.faults.at("sandbox.release")
        machine = self.machines.get(resource.owner)
        if machine is not None:
            await machine.end("ended by the host")
