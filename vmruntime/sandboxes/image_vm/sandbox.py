"""An image pod: a network, and a machine once there is a container."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vmruntime.agent.interface import AgentHello, GuestDevice
from vmruntime.aio.pipeline import in_thread
from vmruntime.model.container import Device, Mount
from vmruntime.model.resources import VmSize
from vmruntime.model.sandbox import NetworkInterface
from vmruntime.sandboxes.image_vm.agent import ImageAgent
from vmruntime.sandboxes.image_vm.boot import image_pod, machine_name, machine_uuid
from vmruntime.sandboxes.image_vm.machine import ImageMachine
from vmruntime.sandboxes.image_vm.prepare import check_devices, volume_serial
from vmruntime.sandboxes.image_vm.volumes import guest_volumes
from vmruntime.sandboxes.interface import LayerDisk, Published, RecordSerials, guest_device


class ImageSandbox:
    """Implements sandboxes.interface.RunningSandbox. It runs until it is stopped: its machine comes and goes."""

    def __init__(self, machine: ImageMachine, agent: ImageAgent, hello: AgentHello) -> None:
        self._machine = machine
        self._agent = agent
        self._hello = hello
        self._phases: dict[str, float] = {}

    @property
    def agent(self) -> ImageAgent:
        """What answers in the place of an agent."""
        return self._agent

    @property
    def machine(self) -> ImageMachine:
        """The pod's machine."""
        return self._machine

    @property
    def hello(self) -> AgentHello:
        """What the agent said of itself."""
        return self._hello

    @property
    def scratch_serial(self) -> str:
        """Empty: there is none."""
        return ""

    @property
    def phases(self) -> dict[str, float]:
        """Nothing takes time: the machine is started with its container."""
        return self._phases

    @property
    def source(self) -> str:
        """Nowhere: guests of other kinds have no source."""
        return ""

    def facts(self) -> dict[str, str | int | bool]:
        """Return what the pod's machine is, and how it is."""
        machine, pod = self._machine, image_pod(self._machine.sandbox)
        vm, defined = machine.vm, machine.definition
        return {
            "name": machine_name(machine.sandbox),
            "uuid": machine_uuid(machine.sandbox),
            "driver": vm.handle.driver if vm is not None else machine.parts.driver,
            "firmware": pod.firmware.value,
            "image": defined.image_id if defined is not None else "",
            "vcpus": defined.size.vcpus if defined is not None else 0,
            "memory_mib": defined.size.memory_mib if defined is not None else 0,
            "running": vm is not None,
            "guest_ready": machine.guest_ready,
            "reboots": vm.reboots if vm is not None else 0,
            "held": self.held,
        }

    @property
    def held(self) -> str:
        """Why the guest does not run."""
        return self._machine.vm.held if self._machine.vm is not None else ""

    def layer_name(self, serial: str) -> str:
        """Return the serial; an image pod's layers are never told to a guest."""
        return serial

    async def attach_nic(self, nic: NetworkInterface, tap_fd: int) -> None:
        """Do nothing: the machine opens its taps when it is started."""

    async def attach_layers(self, layers: Sequence[LayerDisk]) -> None:
        """Do nothing: the disk in them is what boots."""

    async def release_layers(self, serials: Sequence[str]) -> None:
        """Do nothing."""

    async def publish_volumes(self, container_id: str, mounts: Sequence[Mount]) -> Published:
        """Refuse what a VM cannot have; the share itself comes with the machine."""
        await guest_volumes(container_id, mounts, chown=False)
        return Published()

    async def withdraw_volumes(self, container_id: str) -> None:
        """Take away a container's volumes; the share ends with the machine."""
        await self._machine.withdraw_volumes(container_id)

    async def attach_devices(self, devices: Sequence[Device], record: RecordSerials) -> list[GuestDevice]:
        """Refuse what is no block volume; disks come with the machine."""
        await in_thread(lambda: check_devices(self._machine.sandbox, devices))
        if devices:
            await record([volume_serial(device) for device in devices])
        return [guest_device(device, volume_serial(device)) for device in devices]

    async def release_devices(self, unused: Callable[[], Sequence[str]]) -> None:
        """Do nothing: disks go with the machine."""

    async def resize(self, size: VmSize) -> None:
        """Make the machine so large, now or when it is started."""
        await self._machine.resize(size)
        if self._machine.vm is not None:
            await self._agent.online_cpus(size.vcpus)

    async def wait(self) -> str:
        """Wait for ever: nothing but a stop ends a pod that needs no process."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def shut_down(self, grace: float) -> None:
        """Have the guest power off, then end the machine."""
        await self._agent.shutdown(grace)

    async def close(self) -> None:
        """Let go; a machine goes on."""
        await self._agent.close()
        await self._machine.close()
