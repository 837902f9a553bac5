"""The disks of VM images on this host: checked, shared by all pods, freed when nothing needs them."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal

import structlog

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import FailedPrecondition
from vmruntime.images.disk_check import check_disk
from vmruntime.images.disk_header import DiskFormat
from vmruntime.model.image import DiskImage

log = structlog.get_logger()

_FORMATS: Final[dict[DiskFormat, Literal["qcow2", "raw", "vmdk"]]] = {
    DiskFormat.QCOW2: "qcow2",
    DiskFormat.RAW: "raw",
    DiskFormat.VMDK: "vmdk",
}


class DiskStore:
    """Disk files by digest.

    A disk is needed while an image has it, a pod uses it, or someone holds it. What is not needed goes with `collect`.
    """

    def __init__(self, directory: Path, *, max_virtual_size: int, account: str = "") -> None:
        """Read nothing yet; `load` does.

        Args:
            directory: Where the disks are; a single file system with the files that are added.
            max_virtual_size: Bytes; larger disks are refused.
            account: Who VMs run as: its group may read disks, and qemu-img runs under it. Empty: root's alone.
        """
        self._directory = directory
        self._max_virtual_size = max_virtual_size
        self._account = account
        self._disks: dict[str, DiskImage] = {}
        self._holds: dict[str, set[str]] = {}
        # Held while files appear or vanish, so that a disk is never removed between being made and being known.
        self._changing = asyncio.Lock()

    @property
    def max_file_size(self) -> int:
        """Most bytes of a file: an image of a full disk is hardly larger than the disk."""
        return self._max_virtual_size

    async def load(self, known: Iterable[DiskImage]) -> None:
        """Take in the disks that images have, without those whose file is gone or cut short."""
        listed = list(known)
        sound = await in_thread(lambda: self._prepare(listed))
        self._disks = {disk.digest: disk for disk in sound}

    def get(self, digest: str) -> DiskImage | None:
        """Return a disk that is ready."""
        return self._disks.get(digest)

    def path(self, disk: DiskImage) -> Path:
        """Return where a disk's file is, or would be."""
        return self._directory / f"{disk.digest.removeprefix('sha256:')}.{disk.format}"

    def hold(self, owner: str, digest: str) -> None:
        """Keep a disk, present or coming, until the owner releases it; adds to what it holds."""
        self._holds.setdefault(owner, set()).add(digest)

    def release(self, owner: str) -> None:
        """End an owner's holds; files go at the next collect."""
        self._holds.pop(owner, None)

    def usage(self) -> tuple[int, int]:
        """Return the bytes and inodes that disks take. May be called in any thread."""
        disks = tuple(self._disks.values())
        return sum(disk.file_size for disk in disks), len(disks)

    async def add(self, file: Path, digest: str, name: str, declared: DiskFormat | None = None) -> DiskImage:
        """Check a disk and put it in its place; one of this digest that is here already stays as it is.

        Args:
            file: Whole and on the disk; nobody else writes to it. It is moved away, or the caller's to remove.
            digest: "sha256:…" that is to name it.
            name: What messages call it.
            declared: The format that it has to have; None: whatever its header says.

        Raises:
            BadDisk, ResourceExhausted, FailedPrecondition: See disk_check.check_disk.
        """
        await in_thread(lambda: self._open_to_account(file))
        info = await check_disk(
            file, max_virtual_size=self._max_virtual_size, declared=declared, account=self._account, name=name
        )
        disk = DiskImage(
            digest=digest,
            format=_FORMATS[info.format],
            virtual_size=info.virtual_size,
            file_size=info.file_size,
        )
        async with self._changing:
            if ready := self._disks.get(digest):
                return ready
            await in_thread(lambda: _publish(file, self.path(disk)))
            self._disks[digest] = disk
        return disk

    async def collect(self, needed: Callable[[], set[str]]) -> int:
        """Remove the disks that are neither needed nor held and return the bytes freed."""
        async with self._changing:
            keep = needed().union(*self._holds.values())
            doomed = [disk for digest, disk in self._disks.items() if digest not in keep]
            if not doomed:
                return 0
            for disk in doomed:
                del self._disks[disk.digest]
            await in_thread(lambda: _unlink([self.path(disk) for disk in doomed]))
        freed = sum(disk.file_size for disk in doomed)
        log.info("disks removed", count=len(doomed), bytes=freed)
        return freed

    async def sweep(self, keep: Callable[[], set[str]]) -> None:
        """Remove files that no image has: a crash came between a rename and its record.

        Args:
            keep: Returns digests of disks that pods use although no image has them any more.
        """
        async with self._changing:
            known = {self.path(disk).name for disk in self._disks.values()}
            used = {digest.removeprefix("sha256:") for digest in keep()}
            await in_thread(lambda: self._sweep(known, used))

    def _open_to_account(self, file: Path) -> None:
        if self._account and os.geteuid() == 0:
            os.chown(file, -1, _group_of(self._account))
        file.chmod(0o640)

    def _prepare(self, listed: list[DiskImage]) -> list[DiskImage]:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o711)
        return [disk for disk in listed if _size(self.path(disk)) == disk.file_size]

    def _sweep(self, known: set[str], used: set[str]) -> None:
        for path in self._directory.iterdir():
            if path.name not in known and path.stem not in used:
                path.unlink()


def _group_of(account: str) -> int:
    try:
        return pwd.getpwnam(account).pw_gid
    except KeyError:
        raise FailedPrecondition(
            f"hypervisor.user: no account named {account!r}", remedy="create it, or run make setup"
        ) from None


def _publish(file: Path, target: Path) -> None:
    file.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
