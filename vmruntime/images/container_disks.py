"""Disks that come in container images, as KubeVirt's containerDisks do: one QCOW2 or raw file in /disk/."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from vmruntime.aio.mount_space import MountFailed, mount_space
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import FailedPrecondition, ResourceExhausted
from vmruntime.images import erofs
from vmruntime.images.disk_header import BadDisk
from vmruntime.images.disks import DiskStore
from vmruntime.images.scratch import ScratchSpace
from vmruntime.images.shared import SharedWork
from vmruntime.model.image import DiskImage, Layer

DIRECTORY = "disk"
MEMBERS_LIMIT = 100
"""Names in /disk that are looked at: there has to be one."""

_OPAQUE = "trusted.overlay.opaque"
_REMEDY = (
    "an image pod needs one QCOW2 or raw file in /disk/; for an ordinary container image leave out vmruntime.io/kind"
)
_PIECE = 64 * 1024 * 1024
_BLOCK = 64 * 1024
_HOLE = bytes(_BLOCK)


class NoDisk(FailedPrecondition):
    """Raised when a container image has no disk for a VM."""


@dataclasses.dataclass(frozen=True)
class _Level:
    """What one layer says of /disk.

    Attributes:
        members: File types (stat.S_IFMT) by name, without whiteouts.
        gone: Names that do not show of lower layers.
        last: Nothing of lower layers shows.
    """

    members: dict[str, int]
    gone: set[str]
    last: bool


@dataclasses.dataclass(frozen=True)
class _Member:
    """The file that is a disk; `digest` is what it will be called."""

    layer: Layer
    name: str
    digest: str


class ContainerDisks:
    """Finds and takes out disks of container images."""

    def __init__(self, disks: DiskStore, incoming: ScratchSpace, layer_path: Callable[[Layer], Path]) -> None:
        """Do nothing yet.

        Args:
            disks: Where they go.
            incoming: Where they are made; a single file system with `disks`.
            layer_path: Returns where a layer's EROFS image is.
        """
        self._disks = disks
        self._incoming = incoming
        self._layer_path = layer_path
        self._extracting: SharedWork[str, DiskImage] = SharedWork()

    async def disk_of(self, layers: Sequence[Layer], name: str, owner: str) -> DiskImage:
        """Return the disk in an image's layers, taken out when it was not yet.

        As in overlayfs, upper layers hide what is in lower ones; of the rest, the topmost layer that has anything in /disk
        decides, so an image that is built upon another one replaces its disk.

        Args:
            layers: Lowest first; somebody holds them.
            name: Of the image, for messages.
            owner: Under which the disk is held, from before it is made.

        Raises:
            NoDisk: There is nothing in /disk.
            BadDisk: There is something else than one regular file, or the file is not fit for a VM.
            ResourceExhausted: It is too large, or the host's disk is full.
            FailedPrecondition: Layers cannot be looked into on this host.
        """
        member = await self._find(layers, name)
        self._disks.hold(owner, member.digest)
        if ready := self._disks.get(member.digest):
            return ready
        return await self._extracting.join(member.digest, lambda: self._extract(member, name))

    async def _find(self, layers: Sequence[Layer], name: str) -> _Member:
        hidden: set[str] = set()
        for layer in reversed(layers):
            level = await self._level(layer, name)
            if level is None:
                continue
            shown = {member: kind for member, kind in level.members.items() if member not in hidden}
            if shown:
                return _only(layer, level, shown, name)
            hidden |= level.gone
            if level.last:
                break
        raise NoDisk(f"{name}: has nothing in /disk/", remedy=_REMEDY)

    async def _level(self, layer: Layer, name: str) -> _Level | None:
        async with self._mounted(layer) as root:
            try:
                return await in_thread(lambda: _look(root, name))
            except OSError as error:
                raise _disk_error(error, name, root) from error

    async def _extract(self, member: _Member, name: str) -> DiskImage:
        async with self._incoming.directory() as work:
            target = work / "disk"
            try:
                async with self._mounted(member.layer) as root:
                    source = await in_thread(lambda: _open(root, member.name))
                    try:
                        await _copy(source, target)
                    finally:
                        os.close(source)
            except OSError as error:
                raise _disk_error(error, name, work) from error
            return await self._disks.add(target, member.digest, f"{name}, /disk/{_shown(member.name)}")

    @asynccontextmanager
    async def _mounted(self, layer: Layer) -> AsyncIterator[Path]:
        """Yield a directory that is the layer's root; see mount_space() on links."""
        async with self._incoming.directory() as target:
            command = erofs.mount_command(self._layer_path(layer), target, "nosuid", "noexec")
            try:
                async with mount_space(command) as root:
                    yield root / target.relative_to("/")
            except MountFailed as error:
                raise FailedPrecondition(
                    f"the layer {layer.diff_id} cannot be looked into: {error.message}",
                    remedy="containerDisks need the kernel's erofs and loop modules on the host (vmruntime doctor)",
                ) from error


def _look(root: Path, name: str) -> _Level | None:
    """Return what a layer says of /disk; None: nothing."""
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.stat(DIRECTORY, dir_fd=top, follow_symlinks=False)
        if _is_whiteout(status):
            return _Level({}, set(), last=True)
        if not stat.S_ISDIR(status.st_mode):
            raise BadDisk(f"{name}: /disk is not a directory", remedy=_REMEDY)
        directory = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    except FileNotFoundError:
        return None
    finally:
        os.close(top)
    try:
        return _members(directory, name)
    finally:
        os.close(directory)


def _members(directory: int, name: str) -> _Level:
    members: dict[str, int] = {}
    gone: set[str] = set()
    with os.scandir(directory) as scan:
        for number, entry in enumerate(scan):
            if number >= MEMBERS_LIMIT:
                raise BadDisk(f"{name}: has more than {MEMBERS_LIMIT} files in /disk/", remedy=_REMEDY)
            status = entry.stat(follow_symlinks=False)
            if _is_whiteout(status):
                gone.add(entry.name)
            else:
                members[entry.name] = stat.S_IFMT(status.st_mode)
    try:
        opaque = os.getxattr(directory, _OPAQUE) == b"y"
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        opaque = False
    return _Level(members, gone, last=opaque)


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _only(layer: Layer, level: _Level, shown: dict[str, int], name: str) -> _Member:
    others = sorted(member for member, kind in shown.items() if kind != stat.S_IFREG)
    if others:
        raise BadDisk(f"{name}: /disk/{_shown(others[0])} is not a regular file", remedy=_REMEDY)
    if len(shown) > 1:
        listed = ", ".join(_shown(member) for member in sorted(shown)[:5])
        raise BadDisk(f"{name}: has {len(shown)} files in /disk/: {listed}", remedy=_REMEDY)
    member = next(iter(shown))
    # The layer names its one file. Of several, what upper layers hide decides, so that images may differ in it.
    alone = len(level.members) == 1
    digest = layer.diff_id if alone else f"sha256:{hashlib.sha256(_key(layer, member)).hexdigest()}"
    return _Member(layer, member, digest)


def _key(layer: Layer, member: str) -> bytes:
    return f"{layer.diff_id}/".encode() + os.fsencode(member)


def _shown(member: str) -> str:
    """Return a name for messages; an image may give its files any."""
    return member if member.isascii() and member.isprintable() and len(member) <= 100 else repr(member[:100])


def _open(root: Path, member: str) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    top = os.open(root, flags | os.O_DIRECTORY)
    try:
        directory = os.open(DIRECTORY, flags | os.O_DIRECTORY, dir_fd=top)
    finally:
        os.close(top)
    try:
        return os.open(member, flags | os.O_NONBLOCK, dir_fd=directory)
    finally:
        os.close(directory)


async def _copy(source: int, target: Path) -> None:
    """Copy a file, with holes for what is zero. In pieces, so that a caller who is cancelled need not wait for all of it."""
    descriptor = await in_thread(lambda: os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        while await in_thread(lambda: _copy_piece(source, descriptor)):
            pass
        await in_thread(lambda: _finish(source, descriptor))
    finally:
        os.close(descriptor)


def _copy_piece(source: int, target: int) -> bool:
    """Copy some of a file; False at its end."""
    for _ in range(_PIECE // _BLOCK):
        block = os.read(source, _BLOCK)
        if not block:
            return False
        if block == _HOLE:
            os.lseek(target, len(block), os.SEEK_CUR)
            continue
        while block:
            block = block[os.write(target, block) :]
    return True


def _finish(source: int, target: int) -> None:
    os.ftruncate(target, os.fstat(source).st_size)
    os.fsync(target)


def _disk_error(error: OSError, name: str, work: Path) -> FailedPrecondition | ResourceExhausted:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            f"{name}: no space left in {work.parent} for its disk", remedy="free space there, or remove unused images"
        )
    return FailedPrecondition(f"{name}: its disk cannot be taken out of the image: {error.strerror}")
