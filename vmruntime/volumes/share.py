"""The directory a pod's VM sees: a small tmpfs on the host with a bind mount for each volume.

virtiofsd exports the directory and follows mounts made in it later, because the tmpfs is a shared mount (mount_namespaces(7))
and virtiofsd's own namespace a slave of it. On a tmpfs nothing of the volumes can be deleted by mistake: one detach takes
the binds away together, and what remains is an empty directory.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path

from vmruntime.errors import FailedPrecondition
from vmruntime.volumes.mounting import Flag, bind, detach, mount
from vmruntime.volumes.survey import SharedVolume

# Only directories and empty files live in it.
_TMPFS_OPTIONS = "mode=0700,size=4m,nr_inodes=65536"


async def open_share(root: Path) -> None:
    """Make the directory; it must be recorded already. One that is there is kept."""
    await asyncio.to_thread(_open, root)


async def close_share(root: Path) -> None:
    """Detach everything and remove the directory; nothing there: success."""
    await asyncio.to_thread(_close, root)


async def publish(root: Path, name: str, volumes: Sequence[SharedVolume]) -> None:
    """Bind volumes to ROOT/NAME/0, 1, …; when one fails, none stays.

    Raises:
        FailedPrecondition: The host refused a mount; the message names both paths.
    """
    await asyncio.to_thread(_publish, root / name, list(volumes))


async def withdraw(root: Path, name: str) -> None:
    """Take away what publish() made; unknown name: success."""
    await asyncio.to_thread(_withdraw, root / name)


def _open(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.is_mount():
        return
    try:
        mount("vmruntime-share", root, "tmpfs", Flag.NOSUID | Flag.NODEV | Flag.NOEXEC, _TMPFS_OPTIONS)
        # Private first: below a shared mount it would be a peer of every copy of that.
        mount("", root, flags=Flag.PRIVATE)
        mount("", root, flags=Flag.SHARED)
    except OSError as error:
        raise FailedPrecondition(f"the pod's share {root} could not be made: {error.strerror}") from error


def _close(root: Path) -> None:
    detach(root)
    if root.exists():
        root.rmdir()


def _publish(directory: Path, volumes: list[SharedVolume]) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    try:
        for number, volume in enumerate(volumes):
            target = directory / str(number)
            target.mkdir() if volume.directory else target.touch()
            _bind(volume, target)
    except OSError as error:
        _withdraw(directory)
        remedy = "volumes need a host kernel of 5.12 or later" if error.errno == errno.ENOSYS else ""
        raise FailedPrecondition(
            f"config.mounts: {volume.source!r} could not be bound to {target}: {error.strerror}", remedy=remedy
        ) from error


def _bind(volume: SharedVolume, target: Path) -> None:
    wanted = volume.mount
    propagation = Flag.SLAVE if wanted.propagation == "rslave" else Flag.PRIVATE
    bind(
        volume.source,
        target,
        propagation,
        readonly=wanted.readonly,
        recursive_readonly=wanted.recursive_readonly,
    )


def _withdraw(directory: Path) -> None:
    if not directory.is_dir():
        return
    for target in directory.iterdir():
        detach(target)
        target.rmdir() if target.is_dir() else target.unlink()
    directory.rmdir()
