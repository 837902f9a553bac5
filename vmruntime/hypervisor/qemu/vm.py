"""One running QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.tasks import TaskScope
from vmruntime.hypervisor.console import ConsoleLog
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Disk, Nic, VmHandle
from vmruntime.hypervisor.qemu.argv import HOTPLUG_PORTS, disk_blockdev, disk_device, node_name
from vmruntime.hypervisor.qemu.monitor import Monitor
from vmruntime.hypervisor.qemu.resize import plug_cpus, set_memory
from vmruntime.hypervisor.vsock import tail_of
from vmruntime.model.resources import VmSize

DETACH_TIMEOUT = 10.0
# QEMU's words: its errors differ in nothing else that can be relied upon.
NO_DEVICE = "not found"
UNPLUGGING = "already in the process of unplug"
NO_NODE = "Failed to find node"
IN_USE = "is in use"
SHARE = "share"
LAST_WORDS = 1.0
ENDINGS = {
    "guest-shutdown": "the guest powered off",
    "guest-reset": "the guest's kernel panicked or asked for a reboot",
    "guest-panic": "the guest's kernel panicked",
    "host-signal": "QEMU was ended by a signal on the host",
    "host-qmp-quit": "the VM was ended by the host",
}


class QemuVm:
    """A VM and what the daemon needs to talk to it; implements hypervisor.interface.VirtualMachine."""

    def __init__(
        self, handle: VmHandle, process: DetachedProcess, helpers: list[DetachedProcess], monitor: Monitor
    ) -> None:
        self._handle = handle
        self._process = process
        self._helpers = helpers
        self._monitor = monitor
        self._ports = list(range(HOTPLUG_PORTS))
        self._scope = TaskScope(f"vm {handle.id[:13]}")
        self.directory = Path(handle.directory)
        self.console = ConsoleLog(self.directory)
        self._ending = ""
        self._helper_ended = asyncio.Event()
        self._lost_helper = ""

    @property
    def handle(self) -> VmHandle:
        """What adopt() takes."""
        return self._handle

    async def open(self) -> None:
        """Copy the console, listen for the reason of the VM's end, and learn which devices are plugged in."""
        self._scope.start(self.console.copy(self.directory / "console.sock"), "console")
        self._scope.start(self._note_ending(), "endings")
        for helper in self._helpers:
            self._scope.start(self._note_helper_end(helper), "helper")
        plugged = await self._monitor.execute("qom-list", {"path": "/machine/peripheral"})
        used = {item["name"].partition("-")[0] for item in plugged}
        self._ports = [port for port in self._ports if f"at{port}" not in used]

    async def attached_disks(self) -> set[str]:
        """Return the serials of the disks the VM has: every disk's descriptor carries its serial as a label."""
        fdsets = await self._monitor.execute("query-fdsets")
        return {str(fd["opaque"]) for fdset in fdsets for fd in fdset["fds"] if "opaque" in fd}

    def console_tail(self) -> str:
        """Return the last lines of the guest's console."""
        return self.console.tail()

    async def wait_for_console(self, text: str) -> None:
        """Wait until the guest's console shows a line with this text."""
        await self.console.wait_for(text)

    async def attach_disk(self, disk: Disk) -> None:
        """Hot-plug a disk as a SCSI LUN; nothing stays behind when QEMU refuses."""
        node = node_name(disk.serial)
        async with contextlib.AsyncExitStack() as undo:
            fdset = await self._add_fd(disk)
            undo.push_async_callback(self._quietly, "remove-fd", {"fdset-id": fdset})
            arguments = disk_blockdev(node, fdset, readonly=disk.readonly, device=disk.path.is_block_device())
            await self._monitor.execute("blockdev-add", arguments)
            undo.push_async_callback(self._quietly, "blockdev-del", {"node-name": node})
            await self._monitor.execute("device_add", disk_device(node, disk.serial))
            undo.pop_all()

    async def detach_disk(self, serial: str) -> None:
        """Unplug a disk and close its file; unknown serial: success.

        A device that the guest lets go of after an earlier call gave up is gone, and leaves its file behind: so each
        part is taken away whether or not the others are there.
        """
        node = node_name(serial)
        with self._monitor.listen_deleted(f"dev-{node}") as deleted:

            async def wait_until_deleted() -> None:
                if not await deleted(DETACH_TIMEOUT):
                    raise HypervisorError(f"the guest did not let go of {serial} within {DETACH_TIMEOUT:g} s")

            if await self._unplug(f"dev-{node}"):
                await wait_until_deleted()
            if not await self._remove_node(node):
                await wait_until_deleted()  # it cannot be found any more and is not gone yet
                if not await self._remove_node(node):
                    raise HypervisorError(f"the disk {serial} is gone and its file still in use")
        for fdset in await self._monitor.execute("query-fdsets"):
            if any(fd.get("opaque") == serial for fd in fdset["fds"]):
                await self._quietly("remove-fd", {"fdset-id": fdset["fdset-id"]})

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
        plugged = await self._monitor.execute("qom-list", {"path": "/machine/peripheral"})
        return any(item["name"].partition("-")[2] == SHARE for item in plugged)

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

    async def wait(self) -> str:
        """Wait for the end of QEMU or of one of its helpers, and return why."""
        ended = asyncio.ensure_future(self._process.wait())
        lost = asyncio.ensure_future(self._helper_ended.wait())
        try:
            await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                # Helpers end with their QEMU: its own end says more.
                await asyncio.wait({ended}, timeout=LAST_WORDS)
            return self._why(ended.result()) if ended.done() else self._lost_helper
        finally:
            for task in (ended, lost):
                task.cancel()
            await asyncio.wait({ended, lost})

    def _why(self, status: int | None) -> str:
        if self._ending in ENDINGS:
            return ENDINGS[self._ending]
        said = tail_of(self.directory / "qemu.log", 300)
        how = "ended" if status in (None, 0) else f"ended with status {status}"
        return f"QEMU {how}: {said}" if status else f"QEMU {how}"

    async def kill(self) -> None:
        """End QEMU and its helpers at once."""
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
            raise HypervisorError(f"the VM has no free port for {wanted_by}: it has {HOTPLUG_PORTS}")
        return self._ports.pop(0)

    async def _add_fd(self, disk: Disk) -> int:
        flags = os.O_RDONLY if disk.readonly else os.O_RDWR
        with contextlib.ExitStack() as undo:

            def open_disk() -> int:
                fd = os.open(disk.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
                undo.callback(os.close, fd)  # in the thread: the caller may be cancelled and never see the descriptor
                return fd

            try:
                fd = await in_thread(open_disk)  # a block device whose transport is dead blocks
            except OSError as error:
                raise HypervisorError(f"the disk {disk.path} cannot be opened: {error.strerror}") from error
            answer = await self._monitor.execute_with_fd("add-fd", {"opaque": disk.serial}, fd)
        return int(answer["fdset-id"])

    async def _quietly(self, command: str, arguments: dict[str, object]) -> None:
        """Undo a step; its own failure must not hide the one that led here."""
        with contextlib.suppress(HypervisorError):
            await self._monitor.execute(command, arguments)

    async def _note_helper_end(self, helper: DetachedProcess) -> None:
        name = helper.name
        await helper.wait()
        self._lost_helper = f"{name}, which served the VM, ended"
        self._helper_ended.set()

    async def _note_ending(self) -> None:
        async for event in self._monitor.events("SHUTDOWN", "GUEST_PANICKED"):
            data = event.get("data") or {}
            if isinstance(data, dict):
                self._ending = str(data.get("reason", "guest-panic"))
