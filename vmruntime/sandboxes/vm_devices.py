"""Host devices for containers in VMs: block devices are hot-plugged as disks."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection
from pathlib import Path

import msgspec

from vmruntime.errors import InvalidArgument
from vmruntime.hypervisor.interface import Disk
from vmruntime.model.container import Device


def block_disk(device: Device) -> Disk | None:
    """Return a block device as a disk, or None for another kind of device, which the guest has to have itself. Blocks.

    Raises:
        InvalidArgument: The path is no device.
    """
    field = "config.devices[].host_path"
    path = os.path.realpath(device.host_path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None  # only the guest knows whether it has such a device
    except OSError as error:
        raise InvalidArgument.field(field, device.host_path, f"cannot be used: {error.strerror}") from error
    if stat.S_ISBLK(mode):
        readonly = "w" not in device.permissions
        return Disk(path=Path(path), serial=_serial(path, readonly=readonly), readonly=readonly)
    if not stat.S_ISCHR(mode):
        raise InvalidArgument.field(field, device.host_path, "is neither a block nor a character device")
    return None


def as_attached(device: Device, disk: Disk, attached: Collection[str]) -> Disk:
    """Return a device's disk as the VM has it or is to get it: one device is never two disks.

    Args:
        device: What a container asks for.
        disk: Its disk, were it the first.
        attached: Serials of the VM's disks.

    Raises:
        InvalidArgument: It is to be written, and another container has it read-only.
    """
    other = _serial(str(disk.path), readonly=not disk.readonly)
    if other not in attached:
        return disk
    if disk.readonly:
        return msgspec.structs.replace(disk, serial=other, readonly=False)  # the device cgroup keeps it from writing
    raise InvalidArgument.field(
        "config.devices[].permissions",
        device.permissions,
        f"cannot be had: {device.host_path} is in this pod read-only already",
        remedy="give it rw in every container of the pod, or r in this one",
    )


def _serial(path: str, *, readonly: bool) -> str:
    """Return the disk serial of a block device; it says how it is attached, so that a restarted daemon knows."""
    return ("dro-" if readonly else "dev-") + hashlib.sha256(path.encode()).hexdigest()[:20]
