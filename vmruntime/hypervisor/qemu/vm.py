"""One running QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.tasks import TaskScope
from vmruntime.hypervisor.console import ConsoleFile, ConsoleLog
from vmruntime.hypervisor.disks import check_disks
from vmruntime.hypervisor.endings import end_by_status
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Disk, Nic, VmEnd, VmHandle
from vmruntime.hypervisor.qemu.argv import HOTPLUG_PORTS
from vmruntime.hypervisor.qemu.balloon import balloon_stats, poll_balloon
from vmruntime.hypervisor.qemu.blockdev import (
    BACKING_LABEL,
    backing_label,
    device_name,
    disk_blockdev,
    disk_device,
    node_name,
    open_disk,
)
from vmruntime.hypervisor.qemu.endings import Endings
from vmruntime.hypervisor.qemu.machine_argv import MACHINE_PORTS
from vmruntime.hypervisor.qemu.monitor import Monitor
from vmruntime.hypervisor.qemu.resize import plug_cpus, set_memory
from vmruntime.hypervisor.vsock import tail_of
from vmruntime.model.image_pod import DiskDriver
from vmruntime.model.resources import VmSize

DETACH_TIMEOUT = 10.0
# QEMU's words: its errors differ in nothing else that can be relied upon.
NO_DEVICE = "not found"
UNPLUGGING = "already in the process of unplug"
NO_NODE = "Failed to find node"
IN_USE = "is in use"
SHARE = "share"
LAST_WORDS = 1.0


class QemuVm:
    """A VM and what the daemon needs to talk to it; implements hypervisor.interface.VirtualMachine."""

    def __init__(
        self, handle: VmHandle, process: DetachedProcess, helpers: list[DetachedProcess], monitor: Monitor
    ) -> None:
        self._handle = handle
        self._process = process
        self._helpers = helpers
        self._monitor = monitor
        self._by_firmware = bool(handle.uuid)
        self._most_ports = MACHINE_PORTS if self._by_firmware else HOTPLUG_PORTS
        self._ports = list(range(self._most_ports))
        self._scope = TaskScope(f"vm {handle.id[:13]}")
        self.directory = Path(handle.directory)
        self.console = ConsoleFile(self.directory) if self._by_firmware else ConsoleLog(self.directory)
        self._endings = Endings(monitor)
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
        used = {name.partition("-")[0] for name in await self._plugged()}
        self._ports = [port for port in self._ports if f"at{port}" not in used]
        if self._by_firmware:
            await poll_balloon(self._monitor)
            await self._endings.look()

    async def attached_disks(self) -> set[str]:
        """Return the serials of the disks the VM has: every disk's descriptor carries its serial as a label."""
        fdsets = await self._monitor.execute("query-fdsets")
        labels = {str(fd["opaque"]) for fdset in fdsets for fd in fdset["fds"] if "opaque" in fd}
        return {label for label in labels if not label.startswith(BACKING_LABEL)}

    def console_tail(self) -> str:
        """Return the last lines of the guest's console."""
        return self.console.tail()

    async def wait_for_console(self, text: str) -> None:
        """Wait until the guest's console shows a line with this text."""
        await self.console.wait_for(text)

    async def attach_disk(self, disk: Disk) -> None:
        """Hot-plug a disk as a SCSI LUN or into a free root port; nothing stays behind when QEMU refuses."""
        by_port = disk.driver is DiskDriver.VIRTIO and not disk.cdrom
        check_disks([disk], await self.attached_disks() if by_port else ())
        node = node_name(disk.serial)
        async with contextlib.AsyncExitStack() as undo:
            port = None
            if by_port:
                port = self._take_port(disk.serial)
                undo.callback(self._ports.insert, 0, port)
            fdset, backing, is_device = await self._add_fds(disk, undo)
            arguments = disk_blockdev(disk, fdset, device=is_device, backing=backing)
            await self._monitor.execute("blockdev-add", arguments)
            undo.push_async_callback(self._quietly, "blockdev-del", {"node-name": node})
            await self._monitor.execute("device_add", disk_device(disk, port=port))
            undo.pop_all()

    async def detach_disk(self, serial: str) -> None:
        """Unplug a disk and close its file; unknown serial: success.

        A device that the guest lets go of after an earlier call gave up is gone, and leaves its file behind: so each
        part is taken away whether or not the others are there.
        """
        node = node_name(serial)
        device, port = await self._find_disk(serial)
        with self._monitor.listen_deleted(device) as deleted:

            async def wait_until_deleted() -> None:
                if not await deleted(DETACH_TIMEOUT):
                    raise HypervisorError(f"the guest did not let go of {serial} within {DETACH_TIMEOUT:g} s")

            if await self._unplug(device):
                await wait_until_deleted()
            if not await self._remove_node(node):
                await wait_until_deleted()  # it cannot be found any more and is not gone yet
                if not await self._remove_node(node):
                    raise HypervisorError(f"the disk {serial} is gone and its file still in use")
        if port is not None:
            self._ports.append(port)
        labels = (serial, backing_label(serial))
        for fdset in await self._monitor.execute("query-fdsets"):
            if any(fd.get("opaque") in labels for fd in fdset["fds"]):
                await self._quietly("remove-fd", {"fdset-id": fdset["fdset-id"]})

    async def _find_disk(self, serial: str) -> tuple[str, int | None]:
        """Return the id of a disk's device, and the port it is in, if it is in one."""
        plain = device_name(serial)
        for name in await self._plugged() if self._by_firmware else ():
            place, _, rest = name.partition("-")
            if rest == plain and place.startswith("at"):
                return name, int(place.removeprefix("at"))
        return plain, None

    async def _unplug(self, device: str) -> bool:
        """Ask for a device back, if that was not done already; False: there is no such device any more."""
        try:
            await self._monitor.execute("device_del", {"id": device})
        except HypervisorError as error:
            if NO_DEVICE in error.message:
                return False
            if UNPLUGGING not in error.message:
                raise
        return True

    async def _remove_node(self, node: str) -> bool:
        """Close a block node, if there is such a one; False: a device has it."""
        try:
            await self._monitor.execute("blockdev-del", {"node-name": node})
        except HypervisorError as error:
            if IN_USE in error.message:
                return False
            if NO_NODE not in error.message:
                raise
        return True

    async def attach_nic(self, nic: Nic, tap_fd: int) -> None:
        """Hot-plug a NIC into a free root port; the descriptor stays the caller's."""
        async with contextlib.AsyncExitStack() as undo:
            port = self._take_port(nic.id)
            undo.callback(self._ports.insert, 0, port)
            name = f"tap-{nic.id}"
            await self._monitor.execute_with_fd("getfd", {"fdname": name}, tap_fd)
            undo.push_async_callback(self._quietly, "closefd", {"fdname": name})
            await self._monitor.execute("netdev_add", {"type": "tap", "id": f"net-{nic.id}", "fd": name})
            undo.push_async_callback(self._quietly, "netdev_del", {"id": f"net-{nic.id}"})
            await self._monitor.execute(
                "device_add",
                {
                    "driver": "virtio-net-pci",
                    "id": f"at{port}-{nic.id}",
                    "netdev": f"net-{nic.id}",
                    "mac": nic.mac,
                    "bus": f"port{port}",
                    "romfile": "",
                },
            )
            undo.pop_all()

    async def has_share(self) -> bool:
        """Whether the VM has a virtio-fs device."""
        return any(name.partition("-")[2] == SHARE for name in await self._plugged())

    async def attach_share(self, tag: str, backend_fd: int, helper: ProcessIdentity) -> None:
        """Hot-plug a virtio-fs device into a free root port."""
        async with contextlib.AsyncExitStack() as undo:
            port = self._take_port(SHARE)
            undo.callback(self._ports.insert, 0, port)
            await self._monitor.execute_with_fd("getfd", {"fdname": SHARE}, backend_fd)
            undo.push_async_callback(self._quietly, "closefd", {"fdname": SHARE})
            address = {"type": "fd", "data": {"str": SHARE}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            await self._monitor.execute("chardev-add", {"id": SHARE, "backend": backend})
            undo.push_async_callback(self._quietly, "chardev-remove", {"id": SHARE})
            device = {
                "driver": "vhost-user-fs-pci",
                "id": f"at{port}-{SHARE}",
                "chardev": SHARE,
                "tag": tag,
                "bus": f"port{port}",
            }
            await self._monitor.execute("device_add", device)
            undo.pop_all()
        process = DetachedProcess(helper)
        self._helpers.append(process)
        self._scope.start(self._note_helper_end(process), "helper")

    async def resize(self, size: VmSize) -> None:
        """Plug in processors and memory; see hypervisor/qemu/resize.py."""
        await plug_cpus(self._monitor, size.vcpus)
        await set_memory(self._monitor, size.memory_mib, lambda: self._take_port("more memory"))

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
    def reboots(self) -> int:
        """How often the guest has booted again."""
        return self._endings.reboots

    async def balloon_stats(self) -> dict[str, int]:
        """Return what the guest's balloon driver last said; a kernel of ours is asked otherwise."""
        return await balloon_stats(self._monitor) if self._by_firmware else {}

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
            status = ended.result() if ended.done() else None
            self._end = self._how(status)
            return self._why(status)
        finally:
            for task in (ended, lost, over):
                task.cancel()
            await asyncio.wait({ended, lost, over})

    def _how(self, status: int | None) -> VmEnd:
        if self._endings.end is not None:
            return self._endings.end
        return VmEnd.KILLED if self._killed else end_by_status(status)

    def _why(self, status: int | None) -> str:
        if self._endings.reason:
            return self._endings.reason
        said = tail_of(self.directory / "qemu.log", 300)
        how = "ended" if status in (None, 0) else f"ended with status {status}"
        return f"QEMU {how}: {said}" if status else f"QEMU {how}"

    async def kill(self) -> None:
        """End QEMU and its helpers at once."""
        self._killed = self._killed or self._process.alive
        await self._process.end()
        for helper in self._helpers:
            await helper.end()
        await self.close()

    async def close(self) -> None:
        """Let go of the VM without ending it."""
        await self._scope.close()
        await self._monitor.close()

    def _take_port(self, wanted_by: str) -> int:
        if not self._ports:
            raise HypervisorError(f"the VM has no free port for {wanted_by}: it has {self._most_ports}")
        return self._ports.pop(0)

    async def _plugged(self) -> list[str]:
        items = await self._monitor.execute("qom-list", {"path": "/machine/peripheral"})
        return [str(item["name"]) for item in items]

    async def _add_fds(self, disk: Disk, undo: contextlib.AsyncExitStack) -> tuple[int, int | None, bool]:
        """Open a disk and hand its descriptors over.

        Returns:
            The descriptor sets of the disk and of what is below it, and whether it is a block device.
        """

        async def handed_over(fd: int, label: str) -> int:
            answer = await self._monitor.execute_with_fd("add-fd", {"opaque": label}, fd)
            undo.push_async_callback(self._quietly, "remove-fd", {"fdset-id": answer["fdset-id"]})
            return int(answer["fdset-id"])

        with contextlib.ExitStack() as stack:
            # In a thread: a block device whose transport is dead blocks. It is the thread that registers what is to be
            # closed: the caller may be cancelled and never see a descriptor.
            opened = await in_thread(lambda: open_disk(disk, stack, flags=os.O_NOFOLLOW))
            fdset = await handed_over(opened.fd, disk.serial)
            backing = None
            if opened.backing is not None:
                backing = await handed_over(opened.backing, backing_label(disk.serial))
        return fdset, backing, opened.block_device

    async def _quietly(self, command: str, arguments: dict[str, object]) -> None:
        """Undo a step; its own failure must not hide the one that led here."""
        with contextlib.suppress(HypervisorError):
            await self._monitor.execute(command, arguments)

    async def _note_helper_end(self, helper: DetachedProcess) -> None:
        name = helper.name
        await helper.wait()
        self._lost_helper = f"{name}, which served the VM, ended"
        self._helper_ended.set()
