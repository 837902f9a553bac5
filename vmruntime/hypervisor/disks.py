"""What every driver asks of a disk before it plugs it in."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vmruntime.errors import InvalidArgument
from vmruntime.hypervisor.interface import Disk
from vmruntime.model.image_pod import DiskDriver

SERIAL = re.compile(r"[A-Za-z0-9._:+@-]{1,36}")
# What virtio-blk tells the guest of a serial (virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID).
VIRTIO_BLK_CHARACTERS = 20
SECTOR_BYTES = 512


def check_disks(disks: Iterable[Disk], present: Iterable[str] = ()) -> None:
    """Check disks that shall be plugged in together.

    Args:
        disks: The disks.
        present: Serials of the disks that the VM has already.

    Raises:
        InvalidArgument: A disk contradicts itself, or the guest could not tell it from another one.
    """
    serials = list(present)
    for disk in disks:
        check_disk(disk)
        if disk.driver is DiskDriver.VIRTIO and not disk.cdrom:
            _check_told_apart(disk.serial, serials)
        serials.append(disk.serial)


def check_disk(disk: Disk) -> None:
    """Check one disk by itself.

    Raises:
        InvalidArgument: It contradicts itself.
    """
    if not SERIAL.fullmatch(disk.serial):
        raise InvalidArgument.field("serial", disk.serial, "is none: 1 to 36 letters, digits and . _ : + @ -")
    if disk.backing is not None and disk.format != "qcow2":
        raise InvalidArgument.field("backing", str(disk.backing.path), f"is given for a disk of format {disk.format}")
    if disk.size and disk.format != "raw":
        raise InvalidArgument.field("size", disk.size, f"is given for a disk of format {disk.format}")
    if disk.size < 0 or disk.size % SECTOR_BYTES:
        raise InvalidArgument.field("size", disk.size, f"is no multiple of {SECTOR_BYTES} bytes")
    if disk.cdrom and not disk.readonly:
        raise InvalidArgument.field("readonly", disk.readonly, f"is wrong for the CD-ROM {disk.serial}")


def _check_told_apart(serial: str, others: list[str]) -> None:
    seen = serial[:VIRTIO_BLK_CHARACTERS]
    for other in others:
        if other[:VIRTIO_BLK_CHARACTERS] == seen and other != serial:
            raise InvalidArgument.field(
                "serial",
                serial,
                f"looks like {other!r} to the guest: virtio-blk passes on {VIRTIO_BLK_CHARACTERS} characters",
                remedy="choose a shorter serial, or the disk driver scsi",
            )
