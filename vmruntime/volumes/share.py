"""The directory a pod's VM sees: a small tmpfs on the host with a bind mount for each volume.

virtiofsd exports the directory and follows mounts made in it later, because the tmpfs is a shared mount (mount_namespaces(7))
and virtiofsd's own namespace a slave of it. On a tmpfs nothing of the volumes can be deleted by mistake: one detach takes
the binds away together, and what remains is an empty directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from vmruntime.aio.userns import user_namespace_fd
from vmruntime.errors import FailedPrecondition
from vmruntime.model.sandbox import IdMapping, UserNamespace
from vmruntime.volumes.mounting import Flag, NotMappable, bind, detach, mount
from vmruntime.volumes.survey import SharedVolume

# Only directories and empty files live in it.
_TMPFS_OPTIONS = "mode=0700,size=4m,nr_inodes=65536"


async def open_share(root: Path, user: UserNamespace | None = None) -> None:
    """Make the directory; it must be recorded already. One that is there is kept.

    With a user namespace its root may pass through the directory, and through those that publish() makes.
    """
    await asyncio.to_thread(_open, root, user)


async def close_share(root: Path) -> None:
    """Detach everything and remove the directory; nothing there: success."""
    await asyncio.to_thread(_close, root)


async def publish(root: Path, name: str, volumes: Sequence[SharedVolume]) -> None:
    """Bind volumes to ROOT/NAME/0, 1, …; when one fails, none stays.

    Raises:
        FailedPrecondition: The host refused a mount; the message names both paths.
    """
    async with _user_namespaces(volumes) as namespaces:
        await asyncio.to_thread(_publish, root / name, list(volumes), namespaces)


async def withdraw(root: Path, name: str) -> None:
    """Take away what publish() made; unknown name: success."""
    await asyncio.to_thread(_withdraw, root / name)


@contextlib.asynccontextmanager
async def _user_namespaces(volumes: Sequence[SharedVolume]) -> AsyncIterator[dict[UserNamespace, int]]:
    """Yield a descriptor for each user namespace that volumes are to be mapped into."""
    async with contextlib.AsyncExitStack() as stack:
        found: dict[UserNamespace, int] = {}
        for ids in (volume.mount.ids for volume in volumes):
            if ids is not None and ids not in found:
                descriptor = user_namespace_fd(_triple(ids.uids), _triple(ids.gids))
                found[ids] = await stack.enter_async_context(descriptor)
        yield found


def _triple(mapping: IdMapping) -> tuple[int, int, int]:
    return mapping.container_id, mapping.host_id, mapping.length


def let_pass(directory: Path, user: UserNamespace) -> None:
    """Let the root of a user namespace, by its group, pass through a directory."""
    os.chown(directory, -1, user.gids.host_id)
    directory.chmod(0o710)


def _open(root: Path, user: UserNamespace | None) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.is_mount():
        return
    try:
        mount("vmruntime-share", root, "tmpfs", Flag.NOSUID | Flag.NODEV | Flag.NOEXEC, _TMPFS_OPTIONS)
        # Private first: below a shared mount it would be a peer of every copy of that.
        mount("", root, flags=Flag.PRIVATE)
        mount("", root, flags=Flag.SHARED)
        if user is not None:
            let_pass(root, user)
    except OSError as error:
        raise FailedPrecondition(f"the pod's share {root} could not be made: {error.strerror}") from error


def _close(root: Path) -> None:
    detach(root)
    if root.exists():
        root.rmdir()


def _publish(directory: Path, volumes: list[SharedVolume], namespaces: Mapping[UserNamespace, int]) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    # Whoever may enter the share may enter what is in it.
    parent = directory.parent.stat()
    os.chown(directory, -1, parent.st_gid)
    directory.chmod(parent.st_mode & 0o777)
    try:
        for number, volume in enumerate(volumes):
            target = directory / str(number)
            target.mkdir() if volume.directory else target.touch()
            _bind(volume, target, namespaces)
    except NotMappable as error:
        _withdraw(directory)
        raise FailedPrecondition(
            f"{volume.field}.uidMappings: the ids of {volume.source!r}, on a file system of type {volume.fs_type}, cannot"
            f" be mapped by this host's kernel: {error.strerror}",
            remedy="put the volume on a file system that can (ext4, XFS, Btrfs, and tmpfs since Linux 6.3), or leave out"
            " hostUsers: false",
        ) from error
    except OSError as error:
        _withdraw(directory)
        remedy = "volumes need a host kernel of 5.12 or later" if error.errno == errno.ENOSYS else ""
        raise FailedPrecondition(
            f"config.mounts: {volume.source!r} could not be bound to {target}: {error.strerror}", remedy=remedy
        ) from error


def _bind(volume: SharedVolume, target: Path, namespaces: Mapping[UserNamespace, int]) -> None:
    wanted = volume.mount
    propagation = Flag.SLAVE if wanted.propagation == "rslave" else Flag.PRIVATE
    bind(
        volume.source,
        target,
        propagation,
        readonly=wanted.readonly,
        recursive_readonly=wanted.recursive_readonly,
        ids=-1 if wanted.ids is None else namespaces[wanted.ids],
    )


def _withdraw(directory: Path) -> None:
    if not directory.is_dir():
        return
    for target in directory.iterdir():
        detach(target)
        target.rmdir() if target.is_dir() else target.unlink()
    directory.rmdir()
