"""Disks as QEMU is told of them: block nodes over descriptor sets, and the devices that the guest sees."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import msgspec

from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Disk
from vmruntime.hypervisor.qemu.aio import THREADS
from vmruntime.model.image_pod import DiskDriver

BACKING_LABEL = "backing of "


class OpenDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk's descriptors, by number.

    Attributes:
        block_device: It is a block device, not a file.
        backing: Of the image below an overlay.
    """

    fd: int
    block_device: bool = False
    backing: int | None = None

    def all(self) -> list[int]:
        """Return every descriptor."""
        return [self.fd] if self.backing is None else [self.fd, self.backing]


def open_disk(disk: Disk, stack: contextlib.ExitStack, *, flags: int = 0) -> OpenDisk:
    """Open a disk and what is below it; blocks while the transport of a block device is dead.

    Args:
        disk: The disk.
        stack: Closes the descriptors.
        flags: More flags of open(2) for the disk itself.

    Raises:
        HypervisorError: It cannot be opened.
    """

    def opened(path: Path, how: int) -> int:
        try:
            fd = os.open(path, how | os.O_CLOEXEC)
        except OSError as error:
            raise HypervisorError(f"the disk {path} cannot be opened: {error.strerror}") from error
        stack.callback(os.close, fd)
        return fd

    fd = opened(disk.path, flags | (os.O_RDONLY if disk.readonly else os.O_RDWR))
    return OpenDisk(
        fd=fd,
        block_device=stat.S_ISBLK(os.fstat(fd).st_mode),
        backing=None if disk.backing is None else opened(disk.backing.path, os.O_RDONLY),
    )


def backing_label(serial: str) -> str:
    """Return the label of the descriptor set of what is below a disk; a disk's own has its serial."""
    return f"{BACKING_LABEL}{serial}"


def disk_blockdev(
    disk: Disk, fdset: int, *, device: bool = False, backing: int | None = None, aio: str = THREADS
) -> dict[str, object]:
    """Return the blockdev-add arguments of a disk behind a descriptor set.

    Args:
        disk: The disk.
        fdset: Its descriptor set.
        device: It is a block device, not a file.
        backing: The descriptor set of what is below it.
        aio: How QEMU reads and writes: see aio.py.
    """
    node: dict[str, object] = {
        "driver": disk.format,
        "node-name": node_name(disk.serial),
        "read-only": disk.readonly,
        # Freed blocks of the writable layer go back to the host's file system.
        "discard": "ignore" if disk.readonly else "unmap",
        "file": _file(fdset, readonly=disk.readonly, device=device, aio=aio),
    }
    if disk.size:
        node["size"] = disk.size
    if disk.format == "qcow2":
        # None, not left out: else QEMU would open what the file's header names.
        node["backing"] = None if disk.backing is None or backing is None else _below(disk.backing.format, backing, aio)
    return node


def flash_blockdev(node: str, fdset: int, *, readonly: bool) -> dict[str, object]:
    """Return the blockdev-add arguments of a flash chip."""
    file = _file(fdset, readonly=readonly, device=False)
    return {"driver": "raw", "node-name": node, "read-only": readonly, "file": file}


def disk_device(disk: Disk, *, port: int | None = None, bootindex: int | None = None) -> dict[str, object]:
    """Return the device_add arguments of a disk: a SCSI disk or CD-ROM, or virtio-blk.

    Args:
        disk: The disk.
        port: The root port of a virtio-blk that is plugged in; None: it is there from the start.
        bootindex: Its place in the firmware's list; None: it is not in there.
    """
    name = device_name(disk.serial)
    device: dict[str, object]
    if disk.cdrom or disk.driver is DiskDriver.SCSI:
        device = {"driver": "scsi-cd" if disk.cdrom else "scsi-hd", "bus": "scsi0.0"}
    else:
        device = {"driver": "virtio-blk-pci"}
        if port is not None:
            device["bus"] = f"port{port}"
            name = f"at{port}-{name}"
    device |= {"drive": node_name(disk.serial), "id": name, "serial": disk.serial}
    return device if bootindex is None else device | {"bootindex": bootindex}


def node_name(serial: str) -> str:
    """Return the block node of a disk; QEMU allows 31 characters, so a longer serial is told by its digest."""
    return f"d-{serial if len(serial) <= 28 else hashlib.sha256(serial.encode()).hexdigest()[:28]}"


def device_name(serial: str) -> str:
    """Return the id of a disk's device."""
    return f"dev-{node_name(serial)}"


def disk_arguments(disks: list[Disk], opened: list[OpenDisk], *, boot: bool, aio: str = THREADS) -> list[str]:
    """Return the command-line arguments of the disks that are there from the start.

    Disk n is behind descriptor set n; what is below the disks comes after them.

    Args:
        disks: The disks.
        opened: Their descriptors.
        boot: The firmware boots from the first one.
        aio: See aio.py.
    """
    arguments: list[str] = []
    below = len(disks)
    for number, (disk, descriptors) in enumerate(zip(disks, opened, strict=True)):
        arguments += ["-add-fd", f"fd={descriptors.fd},set={number},opaque={disk.serial}"]
        backing = None
        if descriptors.backing is not None:
            backing, below = below, below + 1
            arguments += ["-add-fd", f"fd={descriptors.backing},set={backing},opaque={backing_label(disk.serial)}"]
        node = disk_blockdev(disk, number, device=descriptors.block_device, backing=backing, aio=aio)
        device = disk_device(disk, bootindex=1 if boot and number == 0 else None)
        arguments += ["-blockdev", msgspec.json.encode(node).decode()]
        arguments += ["-device", msgspec.json.encode(device).decode()]
    return arguments


def _file(fdset: int, *, readonly: bool, device: bool, aio: str = THREADS) -> dict[str, object]:
    return {
        "driver": "host_device" if device else "file",
        "filename": f"/dev/fdset/{fdset}",
        "aio": aio,
        "read-only": readonly,
        # Layers are immutable and shared by every VM: no lock; the writable layer has one user.
        "locking": "off" if readonly else "auto",
    }


def _below(image_format: str, fdset: int, aio: str) -> dict[str, Any]:
    node: dict[str, Any] = {"driver": image_format, "read-only": True}
    node["file"] = _file(fdset, readonly=True, device=False, aio=aio)
    return node if image_format == "raw" else node | {"backing": None}
