"""What the machine of an image pod is made of, and what became of it: a small file in the pod's directory of disks."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

import msgspec

from vmruntime.errors import Internal
from vmruntime.hypervisor.interface import Backing, Disk
from vmruntime.model.container import Mount
from vmruntime.model.image_pod import DiskDriver
from vmruntime.model.resources import VmSize

FILE = "machine.json"


class MachineDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk; see hypervisor.interface.Disk. An empty `backing`: it has none."""

    path: str
    serial: str
    readonly: bool = False
    format: Literal["raw", "qcow2"] = "raw"
    backing: str = ""
    backing_format: Literal["raw", "qcow2", "vmdk"] = "raw"
    size: int = 0
    driver: DiskDriver = DiskDriver.SCSI
    cdrom: bool = False

    def disk(self) -> Disk:
        """Return it as a hypervisor takes it."""
        backing = Backing(path=Path(self.backing), format=self.backing_format) if self.backing else None
        return Disk(
            path=Path(self.path),
            serial=self.serial,
            readonly=self.readonly,
            format=self.format,
            backing=backing,
            size=self.size,
            driver=self.driver,
            cdrom=self.cdrom,
        )


class MachineExit(msgspec.Struct, frozen=True, kw_only=True):
    """How a machine ended; `time` is nanoseconds since the epoch, `message` a sentence."""

    code: int
    message: str
    time: int


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """The machine of one container.

    Attributes:
        size: As the container asked for; what the pod has grown to meanwhile counts more.
        disks: The first is the one it boots from.
        mounts: Volumes of the host on its share, which numbers them.
        console_start: Size of the console's file when the container was made: what is before is an earlier one's.
        started_at: Nanoseconds since the epoch, written before it is started; 0: it was not.
        booted: The guest was let run: written a moment after. A start that a daemon did not get so far with is undone.
        guest_ready: The guest has said that it is up, which it does once.
        ended: None: nobody has seen its end.
    """

    container_id: str
    image_id: str
    size: VmSize
    disks: list[MachineDisk]
    mounts: list[Mount] = []
    console_start: int = 0
    started_at: int = 0
    booted: bool = False
    guest_ready: bool = False
    ended: MachineExit | None = None


def load(directory: Path) -> Definition | None:
    """Return the definition in a directory; None: there is none. Blocks.

    Raises:
        Internal: It cannot be read.
    """
    path = directory / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Definition)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise Internal(f"what the pod's machine is made of cannot be read from {path}: {error}") from error


def save(directory: Path, definition: Definition) -> None:
    """Write a definition, whole or not at all. Blocks."""
    path, part = directory / FILE, directory / f"{FILE}.part"
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(definition))
    part.replace(path)


def forget(directory: Path) -> None:
    """Remove a definition; none: success. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        (directory / FILE).unlink()
