"""Devices that are plugged in and out by QMP, whichever way QEMU's monitor is reached."""

from __future__ import annotations

import contextlib
import os

from vmruntime import tracing
from vmruntime.aio.pipeline import in_thread
from vmruntime.hypervisor.disks import check_disks
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Disk, Nic
from vmruntime.hypervisor.qemu.aio import THREADS
from vmruntime.hypervisor.qemu.blockdev import (
    BACKING_LABEL,
    backing_label,
    device_name,
    disk_blockdev,
    disk_device,
    node_name,
    open_disk,
)
from vmruntime.hypervisor.qemu.machine_argv import PORTS
from vmruntime.hypervisor.qemu.resize import plug_cpus, set_memory
from vmruntime.hypervisor.qmp.monitor import Monitor
from vmruntime.model.image_pod import DiskDriver
from vmruntime.model.resources import VmSize

DETACH_TIMEOUT = 10.0
# QEMU's words: its errors differ in nothing else that can be relied upon.
NO_DEVICE = "not found"
UNPLUGGING = "already in the process of unplug"
NO_NODE = "Failed to find node"
IN_USE = "is in use"
SHARE = "share"
VSOCK = "vsock"


class Devices:
    """What is plugged into one VM: into the root ports port0 … and the SCSI controller scsi0.

    Args:
        monitor: QEMU's.
        by_firmware: The VM boots from its disk: virtio-blk disks may be in its ports.
        aio: How QEMU reads and writes what is plugged in: see hypervisor/qemu/aio.py.
    """

    def __init__(self, monitor: Monitor, *, by_firmware: bool, aio: str = THREADS) -> None:
        self._monitor = monitor
        self._aio = aio
        self._by_port = by_firmware
        self._ports = list(range(PORTS))

    async def learn(self) -> None:
        """Learn which ports are taken, from a VM that an earlier daemon may have plugged devices into."""
        used = {name.partition("-")[0] for name in await self._plugged()}
        self._ports = [port for port in self._ports if f"at{port}" not in used]

    async def attached_disks(self) -> set[str]:
        """Return the serials of the disks the VM has: every disk's descriptor carries its serial as a label."""
        fdsets = await self._monitor.execute("query-fdsets")
        labels = {str(fd["opaque"]) for fdset in fdsets for fd in fdset["fds"] if "opaque" in fd}
        return {label for label in labels if not label.startswith(BACKING_LABEL)}

    @tracing.timed("vm.plug_disk")
    async def attach_disk(self, disk: Disk, *, bootindex: int | None = None) -> None:
        """Hot-plug a disk as a SCSI LUN or into a free root port; nothing stays behind when QEMU refuses.

        Args:
            disk: The disk.
            bootindex: Its place in the firmware's list, from the next reset on; None: it is not in there.
        """
        by_port = disk.driver is DiskDriver.VIRTIO and not disk.cdrom
        check_disks([disk], await self.attached_disks() if by_port else ())
        node = node_name(disk.serial)
        async with contextlib.AsyncExitStack() as undo:
            port = None
            if by_port:
                port = self._take_port(disk.serial)
                undo.callback(self._ports.insert, 0, port)
            fdset, backing, is_device = await self._add_fds(disk, undo)
            arguments = disk_blockdev(disk, fdset, device=is_device, backing=backing, aio=self._aio)
            await self._monitor.execute("blockdev-add", arguments)
            undo.push_async_callback(self._quietly, "blockdev-del", {"node-name": node})
            await self._monitor.execute("device_add", disk_device(disk, port=port, bootindex=bootindex))
            undo.pop_all()

    @tracing.timed("vm.unplug_disk")
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
        for name in await self._plugged() if self._by_port else ():
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

    @tracing.timed("vm.plug_nic")
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

    async def attach_vsock(self, cid: int, fd: int, *, native: bool) -> None:
        """Hot-plug a vsock into a free root port; the descriptor stays the caller's.

        Args:
            cid: The guest's context id.
            fd: /dev/vhost-vsock, or a connection to vhost-device-vsock.
            native: It is the former.
        """
        async with contextlib.AsyncExitStack() as undo:
            port = self._take_port(VSOCK)
            undo.callback(self._ports.insert, 0, port)
            await self._monitor.execute_with_fd("getfd", {"fdname": VSOCK}, fd)
            undo.push_async_callback(self._quietly, "closefd", {"fdname": VSOCK})
            device: dict[str, object] = {"id": f"at{port}-{VSOCK}", "bus": f"port{port}"}
            if native:
                device |= {"driver": "vhost-vsock-pci", "guest-cid": cid, "vhostfd": VSOCK}
            else:
                await self._add_backend(VSOCK, undo)
                device |= {"driver": "vhost-user-vsock-pci", "chardev": VSOCK}
            await self._monitor.execute("device_add", device)
            undo.pop_all()

    async def _add_backend(self, name: str, undo: contextlib.AsyncExitStack) -> None:
        """Make a vhost-user backend of the descriptor with this name."""
        address = {"type": "fd", "data": {"str": name}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self._monitor.execute("chardev-add", {"id": name, "backend": backend})
        undo.push_async_callback(self._quietly, "chardev-remove", {"id": name})

    async def has_share(self) -> bool:
        """Whether the VM has a virtio-fs device."""
        return any(name.partition("-")[2] == SHARE for name in await self._plugged())

    @tracing.timed("vm.plug_share")
    async def attach_share(self, tag: str, backend_fd: int) -> None:
        """Hot-plug a virtio-fs device into a free root port."""
        async with contextlib.AsyncExitStack() as undo:
            port = self._take_port(SHARE)
            undo.callback(self._ports.insert, 0, port)
            await self._monitor.execute_with_fd("getfd", {"fdname": SHARE}, backend_fd)
            undo.push_async_callback(self._quietly, "closefd", {"fdname": SHARE})
            await self._add_backend(SHARE, undo)
            device = {
                "driver": "vhost-user-fs-pci",
                "id": f"at{port}-{SHARE}",
                "chardev": SHARE,
                "tag": tag,
                "bus": f"port{port}",
            }
            await self._monitor.execute("device_add", device)
            undo.pop_all()

    async def resize(self, size: VmSize) -> None:
        """Plug in processors and memory; see hypervisor/qemu/resize.py."""
        await plug_cpus(self._monitor, size.vcpus)
        await set_memory(self._monitor, size.memory_mib, lambda: self._take_port("more memory"))

    def _take_port(self, wanted_by: str) -> int:
        if not self._ports:
            raise HypervisorError(f"the VM has no free port for {wanted_by}: it has {PORTS}")
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
