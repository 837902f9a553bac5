"""Host devices for containers in VMs: block devices are hot-plugged as disks."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

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
        return Disk(path=Path(path), serial=device_serial(device.host_path), readonly=readonly)
    if not stat.S_ISCHR(mode):
        raise InvalidArgument.field(field, device.host_path, "is neither a block nor a character device")
    return None


def device_serial(host_path: str) -> str:
    """Return the disk serial of a block device, the same for every container of a pod."""
    return "dev-" + hashlib.sha256(os.path.realpath(host_path).encode()).hexdigest()[:20]
