"""One running QEMU, seen through its monitor."""

from __future__ import annotations

import asyncio
from pathlib import Path

from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.tasks import TaskScope
from vmruntime.hypervisor.console import ConsoleFile, ConsoleLog
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Disk, Nic, VmEnd, VmHandle
from vmruntime.hypervisor.qemu.aio import THREADS
from vmruntime.hypervisor.qemu.balloon import balloon_stats, poll_balloon
from vmruntime.hypervisor.qemu.endings import Endings
from vmruntime.hypervisor.qemu.machine_argv import BALLOON
from vmruntime.hypervisor.qmp.devices import Devices
from vmruntime.hypervisor.qmp.monitor import Monitor
from vmruntime.hypervisor.qmp.room import RoomWatch
from vmruntime.hypervisor.vsock import vsock_answers
from vmruntime.model.resources import VmSize

LAST_WORDS = 1.0


class QmpVm:
    """A VM and what the daemon needs to talk to it; implements hypervisor.interface.VirtualMachine.

    A driver's own class says how a VM is killed and how one ended that did not say so itself.
    """

    def __init__(
        self,
        handle: VmHandle,
        process: DetachedProcess,
        helpers: list[DetachedProcess],
        monitor: Monitor,
        *,
        balloon: str = BALLOON,
        aio: str = THREADS,
    ) -> None:
        self._handle = handle
        self._process = process
        self._helpers = helpers
        self._monitor = monitor
        self._balloon = balloon
        self._by_firmware = bool(handle.uuid)
        self._devices = Devices(monitor, by_firmware=self._by_firmware, aio=aio)
        self._scope = TaskScope(f"vm {handle.id[:13]}")
        self.directory = Path(handle.directory)
        self.console = ConsoleFile(self.directory) if self._by_firmware else ConsoleLog(self.directory)
        self._endings = Endings(monitor)
        self._room = RoomWatch(handle.id[:13], monitor, self.resume, self._check_vsock)
        self._end = VmEnd.LOST
        self._killed = False
        self._helper_ended = asyncio.Event()
        self._lost_helper = ""

    @property
    def handle(self) -> VmHandle:
        """What adopt() takes."""
        return self._handle

    async def open(self) -> None:
        """Copy the console, listen for the reason of the VM's end, and learn which devices are plugged in."""
        if isinstance(self.console, ConsoleLog):
            self._scope.start(self.console.copy(self.directory / "console.sock"), "console")
        self._scope.start(self._endings.listen(), "endings")
        for helper in self._helpers:
            self._scope.start(self._note_helper_end(helper), "helper")
        await self._devices.learn()
        await self._room.look()
        self._scope.start(self._room.watch(), "room")
        if self._by_firmware:
            await poll_balloon(self._monitor, self._balloon)
            await self._endings.look()

    async def attached_disks(self) -> set[str]:
        """Return the serials of the disks the VM has."""
        return await self._devices.attached_disks()

    def console_tail(self) -> str:
        """Return the last lines of the guest's console."""
        return self.console.tail()

    async def wait_for_console(self, text: str) -> None:
        """Wait until the guest's console shows a line with this text."""
        await self.console.wait_for(text)

    async def attach_disk(self, disk: Disk) -> None:
        """Hot-plug a disk."""
        await self._devices.attach_disk(disk)

    async def detach_disk(self, serial: str) -> None:
        """Unplug a disk and close its file; unknown serial: success."""
        await self._devices.detach_disk(serial)

    async def attach_nic(self, nic: Nic, tap_fd: int) -> None:
        """Hot-plug a NIC; the descriptor stays the caller's."""
        await self._devices.attach_nic(nic, tap_fd)

    async def has_share(self) -> bool:
        """Whether the VM has a virtio-fs device."""
        return await self._devices.has_share()

    async def attach_share(self, tag: str, backend_fd: int, helper: ProcessIdentity) -> None:
        """Hot-plug a virtio-fs device."""
        await self._devices.attach_share(tag, backend_fd)
        process = DetachedProcess(helper)
        self._helpers.append(process)
        self._scope.start(self._note_helper_end(process), "helper")

    async def resize(self, size: VmSize) -> None:
        """Plug in processors and memory."""
        await self._devices.resize(size)

    async def freeze(self) -> bytes:
        """Refuse: not every driver can."""
        raise HypervisorError(f"the driver {self._handle.driver} freezes no guests")

    async def thaw(self, state: bytes) -> None:
        """Refuse: not every driver can."""
        raise HypervisorError(f"the driver {self._handle.driver} freezes no guests")

    async def resume(self) -> None:
        """Let the guest run."""
        await self._monitor.execute("cont")

    async def pause(self) -> None:
        """Hold the guest's processors."""
        await self._monitor.execute("stop")

    async def press_power_button(self) -> None:
        """Send an ACPI power-button event."""
        await self._monitor.execute("system_powerdown")

    async def reset(self) -> None:
        """Reset the machine."""
        await self._monitor.execute("system_reset")

    @property
    def held(self) -> str:
        """Why the guest does not run; empty: it is not held."""
        return self._room.held

    @property
    def reboots(self) -> int:
        """How often the guest has booted again."""
        return self._endings.reboots

    async def balloon_stats(self) -> dict[str, int]:
        """Return what the guest's balloon driver last said; a kernel of ours is asked otherwise."""
        return await balloon_stats(self._monitor, self._balloon) if self._by_firmware else {}

    @property
    def end(self) -> VmEnd:
        """How it ended."""
        return self._end

    async def wait(self) -> str:
        """Wait for the end of QEMU, of its guest or of one of its helpers, and return why.

        QEMU itself stays when the guest of a machine that boots from its disk has ended, until kill(): a daemon that
        ends in between finds the reason again.
        """
        ended = asyncio.ensure_future(self._process.wait())
        lost = asyncio.ensure_future(self._helper_ended.wait())
        over = asyncio.ensure_future(self._endings.over.wait())
        try:
            await asyncio.wait({ended, lost, over}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and not over.done():
                # Helpers end with their QEMU: its own end says more.
                await asyncio.wait({ended, over}, timeout=LAST_WORDS, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and not over.done():
                return self._lost_helper
            self._end, reason = await self._how(ended.result() if ended.done() else None)
            return reason
        finally:
            for task in (ended, lost, over):
                task.cancel()
            await asyncio.wait({ended, lost, over})

    async def kill(self) -> None:
        """End QEMU and its helpers at once."""
        self._killed = self._killed or self._process.alive
        await self._end_qemu()
        await self._process.end()
        for helper in self._helpers:
            await helper.end()
        await self.close()

    async def close(self) -> None:
        """Let go of the VM without ending it."""
        await self._scope.close()
        await self._monitor.close()

    async def _how(self, status: int | None) -> tuple[VmEnd, str]:
        if self._endings.end is None:
            unannounced = await self._unannounced(status)
        if self._endings.end is None:  # still: an event may have been on its way
            return unannounced
        return self._endings.end, self._endings.reason

    async def _end_qemu(self) -> None:
        """End QEMU in the driver's own way; whatever is left of it after that is killed."""

    async def _unannounced(self, status: int | None) -> tuple[VmEnd, str]:
        """Return how QEMU ended that had said nothing of it, and why.

        Args:
            status: Its exit status as of subprocess; None: nobody knows it.
        """
        raise NotImplementedError

    async def _check_vsock(self) -> None:
        """Find out whether the vsock helper is of use after the VM was held: vhost-device-vsock 0.3 can lock up."""
        if self._handle.vsock and not await vsock_answers(Path(self._handle.vsock)):
            self._lost_helper = "its vsock helper did not outlive that the VM was held for want of room on the host"
            self._helper_ended.set()

    async def _note_helper_end(self, helper: DetachedProcess) -> None:
        name = helper.name
        await helper.wait()
        self._lost_helper = f"{name}, which served the VM, ended"
        self._helper_ended.set()
