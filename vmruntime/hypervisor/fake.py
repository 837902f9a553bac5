"""A hypervisor in memory: its VMs have devices, a console, a vsock and an end, and whatever guest is put into them.

What the world has of a VM is a FakeMachine (hypervisor/fake_machine.py), on which tests press and pull. Faults are
ordered by "vm." and the method's name, by "vm.process ROLE" for a process about to run, and by "vm.boot" for the guest.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Iterable

from vmruntime.aio.detached import ProcessIdentity
from vmruntime.aio.faults import Faults
from vmruntime.hypervisor.disks import check_disks
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.fake_machine import FakeMachine, Guest
from vmruntime.hypervisor.interface import (
    Accelerator,
    Disk,
    Nic,
    Recorder,
    VmEnd,
    VmHandle,
    VmSpec,
    VsockTransport,
)
from vmruntime.model.resources import VmSize

MOST_NICS = 8
CONSOLE_LINES = 12
FROZEN = b"a frozen guest"


class FakeVm:
    """A daemon's hold of a machine; implements hypervisor.interface.VirtualMachine."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self._closed = False
        self._reboots_before = machine.reboots

    @property
    def handle(self) -> VmHandle:
        """What adopt() takes."""
        return self.machine.handle

    def console_tail(self) -> str:
        """Return the last lines of the console."""
        return "\n".join(self.machine.console[-CONSOLE_LINES:])

    async def wait_for_console(self, text: str) -> None:
        """Wait until the console shows a line with this text."""
        await self.machine.wait_for_line(text)

    async def attached_disks(self) -> set[str]:
        """Return the serials of the disks."""
        await self._at("attached_disks")
        return set(self.machine.disks)

    async def attach_disk(self, disk: Disk) -> None:
        """Plug a disk in."""
        await self._at("attach_disk")
        if disk.serial in self.machine.disks:
            raise HypervisorError(f"a disk with the serial {disk.serial} is there already")
        check_disks([disk], self.machine.disks)
        _try_open(disk)
        self.machine.disks[disk.serial] = disk
        await self._at("attach_disk done")

    async def detach_disk(self, serial: str) -> None:
        """Unplug a disk; unknown: success."""
        await self._at("detach_disk")
        self.machine.disks.pop(serial, None)

    async def attach_nic(self, nic: Nic, tap_fd: int) -> None:
        """Plug a NIC in; any open descriptor will do."""
        await self._at("attach_nic")
        if len(self.machine.nics) == MOST_NICS:
            raise HypervisorError(f"the VM has no free port for {nic.id}: it has {MOST_NICS}")
        try:
            os.fstat(tap_fd)
        except OSError as error:
            raise HypervisorError(f"no tap for {nic.id}: {error.strerror}") from error
        self.machine.nics[nic.id] = nic
        await self._at("attach_nic done")

    async def has_share(self) -> bool:
        """Whether there is a share."""
        await self._at("has_share")
        return bool(self.machine.shares)

    async def attach_share(self, tag: str, backend_fd: int, helper: ProcessIdentity) -> None:
        """Plug a share in; nobody speaks to the backend."""
        await self._at("attach_share")
        if not stat.S_ISSOCK(os.fstat(backend_fd).st_mode):
            raise HypervisorError("the share's backend is no socket")
        self.machine.shares.append(tag)

    async def resize(self, size: VmSize) -> None:
        """Make the machine larger, up to what its spec allows."""
        await self._at("resize")
        spec = self.machine.spec.size
        for what, wanted, limit in (
            ("processors", size.vcpus, max(spec.max_vcpus, spec.vcpus)),
            ("MiB", size.memory_mib, max(spec.max_memory_mib, spec.memory_mib)),
        ):
            if wanted > limit:
                raise HypervisorError(f"the VM has room for {limit} {what}, {wanted} are wanted")
        self.machine.size = VmSize(
            vcpus=max(self.machine.size.vcpus, size.vcpus), memory_mib=max(spec.memory_mib, size.memory_mib)
        )

    async def freeze(self) -> bytes:
        """Hold the machine for good."""
        await self._at("freeze")
        self.machine.hold()
        return FROZEN

    async def thaw(self, state: bytes) -> None:
        """Take what freeze() gave, and nothing else."""
        await self._at("thaw")
        if not self.machine.spec.frozen or state != FROZEN:
            raise HypervisorError("this is no state of a frozen guest, or no VM for one")

    async def resume(self) -> None:
        """Let the guest run."""
        await self._at("resume")
        self.machine.run()

    async def pause(self) -> None:
        """Hold its processors."""
        await self._at("pause")
        self.machine.hold()

    @property
    def held(self) -> str:
        """What the test put into the machine."""
        return self.machine.held

    async def press_power_button(self) -> None:
        """Press the power button."""
        await self._at("press_power_button")
        self.machine.press()

    async def reset(self) -> None:
        """Press the reset button."""
        await self._at("reset")
        await self.machine.reboot()

    @property
    def reboots(self) -> int:
        """How often the guest booted again under this hold."""
        return self.machine.reboots - self._reboots_before

    async def balloon_stats(self) -> dict[str, int]:
        """Return what the test put into the balloon."""
        await self._at("balloon_stats")
        return dict(self.machine.balloon)

    @property
    def end(self) -> VmEnd:
        """How it ended."""
        return self.machine.end or VmEnd.LOST

    async def wait(self) -> str:
        """Wait for the VM's end."""
        return await self.machine.wait()

    async def kill(self) -> None:
        """End the VM."""
        await self.machine.faults.at("vm.kill")
        self.machine.collected = True
        await self.machine.crash()

    async def close(self) -> None:
        """Let go."""
        self._closed = True

    async def _at(self, step: str) -> None:
        await self.machine.faults.at(f"vm.{step}")
        if self._closed or self.machine.ended:
            raise VmGone("QEMU's monitor is closed: the fake VM is off, or was let go of")


class FakeHypervisor:
    """Implements hypervisor.interface.Hypervisor.

    Attributes:
        machines: The last machine that was started of each sandbox, by its id; adopt() finds them here.
        forgotten: What forget() was called with, in order.
        frozen_shape: What guests that can be frozen depend on; empty: they cannot be.
    """

    def __init__(self, guests: Callable[[VmSpec], Guest], faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.machines: dict[str, FakeMachine] = {}
        self.forgotten: list[str] = []
        self.frozen_shape = ""
        self._earlier: list[FakeMachine] = []
        self._guests = guests

    @property
    def accelerator(self) -> Accelerator:
        """How guests run here: not at all."""
        return Accelerator.TCG

    @property
    def transport(self) -> VsockTransport:
        """How the host reaches guests here."""
        return VsockTransport.VHOST_USER

    async def shape(self, spec: VmSpec) -> str:
        """Return nothing, unless a test has said of what guests it is that they can be frozen."""
        return f"{self.frozen_shape}-{spec.size.memory_mib}" if self.frozen_shape else ""

    async def start(self, spec: VmSpec, record: Recorder) -> FakeVm:
        """Start a machine and boot its guest in the background."""
        await self.faults.at("vm.start")
        check_disks(spec.disks)
        for disk in spec.disks:
            _try_open(disk)
        if spec.memory is not None and not spec.frozen:
            os.pwrite(spec.memory.fd, b"a fake guest's memory", 0)
        machine = FakeMachine(spec, self.faults)
        await machine.launch(self._guests(spec), record)
        if spec.id in self.machines:
            self._earlier.append(self.machines[spec.id])
        self.machines[spec.id] = machine
        try:
            await self.faults.at("vm.start done")
        except BaseException:
            await asyncio.shield(machine.crash())
            raise
        return FakeVm(machine)

    async def adopt(self, handle: VmHandle) -> FakeVm:
        """Take over a machine that an earlier daemon started."""
        await self.faults.at("vm.adopt")
        machine = self.machines.get(handle.id)
        if machine is None or machine.collected or machine.handle.process != handle.process:
            raise VmGone("QEMU ended while no daemon was running")
        if not machine.process.alive:
            await machine.wait()
        # A machine started by firmware stays, turned off, until somebody has learnt how it ended.
        told = machine.by_firmware and machine.end in (VmEnd.POWEROFF, VmEnd.CRASH)
        if machine.ended and not told:
            raise VmGone("QEMU ended while no daemon was running")
        return FakeVm(machine)

    async def sweep(self, keep: Iterable[str]) -> list[str]:
        """Find nothing: a process is in the ledger before it becomes QEMU."""
        return []

    async def forget(self, uuid: str) -> None:
        """End the machine with this UUID, if there is one."""
        await self.faults.at("vm.forget")
        self.forgotten.append(uuid)
        for machine in [*self._earlier, *self.machines.values()]:
            if machine.handle.uuid == uuid:
                machine.collected = True
                await machine.crash()

    async def close(self) -> None:
        """End every machine; for the end of a test."""
        for machine in [*self._earlier, *self.machines.values()]:
            await machine.close()


def _try_open(disk: Disk) -> None:
    try:
        with disk.path.open("rb" if disk.readonly else "r+b"):
            pass
        if disk.backing is not None:
            with disk.backing.path.open("rb"):
                pass
    except OSError as error:
        raise HypervisorError(f"the disk {error.filename} cannot be opened: {error.strerror}") from error
