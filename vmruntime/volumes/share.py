"""The directory a pod's VM sees: a small tmpfs on the host, with a bind mount for each volume in virtiofsd's namespace.

virtiofsd has a mount namespace of its own, whose root is the directory, and the binds are made in there. So the host sees
none of them: whoever unmounts or removes something below a volume's path there is not told that it is busy, and when
virtiofsd ends, the kernel takes them away. On a tmpfs nothing of the volumes can be deleted by mistake.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

from vmruntime.aio.detached import DetachedProcess
from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.userns import user_namespace_fd
from vmruntime.errors import FailedPrecondition
from vmruntime.model.sandbox import IdMapping, UserNamespace
from vmruntime.volumes.mounting import Flag, NotMappable, attach, clone, detach, make_readonly, mount
from vmruntime.volumes.namespace import inside
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


async def publish(root: Path, server: DetachedProcess | None, name: str, volumes: Sequence[SharedVolume]) -> None:
    """Bind volumes to /NAME/0, 1, … of the share; when one fails, none stays.

    Args:
        root: The share.
        server: Its virtiofsd, in whose namespace the binds are made; None: they are made on the host.
        name: One path component.
        volumes: In the order of their numbers.

    Raises:
        FailedPrecondition: The host refused something; the message names its path.
    """
    async with _user_namespaces(volumes) as namespaces:
        await in_thread(lambda: _publish(root, server, name, list(volumes), namespaces))


async def withdraw(root: Path, name: str) -> None:
    """Take away what publish() made; unknown name: success.

    Raises:
        FailedPrecondition: The host refused something; the message names its path.
    """
    await in_thread(lambda: _withdraw(root, name))


async def seal(root: Path, server: DetachedProcess) -> None:
    """Make the share itself read-only for its virtiofsd; volumes in it stay what they are.

    Comes before the guest sees the share: a guest that could rename what is in it, or make links there, would lead this
    process, which works on the same directories, to other places of the host.

    Raises:
        FailedPrecondition: virtiofsd has ended, or does not take the share for its root directory.
    """
    try:
        await in_thread(lambda: inside(server, root, lambda: make_readonly(Path("/"))))
    except OSError as error:
        raise FailedPrecondition(f"virtiofsd does not serve {root}: {error.strerror}; see its log") from error


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


def _publish(
    root: Path,
    server: DetachedProcess | None,
    name: str,
    volumes: list[SharedVolume],
    namespaces: Mapping[UserNamespace, int],
) -> None:
    try:
        with _made_directory(root, name) as directory, contextlib.ExitStack() as trees:
            places: list[tuple[int, str]] = []
            for number, volume in enumerate(volumes):
                _make_target(directory, str(number), volume)
                tree = _clone(volume, namespaces)
                trees.callback(os.close, tree)
                places.append((tree, f"{name}/{number}"))
            _where_binds_are(root, server, lambda here: _attach(places, here))
    except NotMappable as error:
        _withdraw(root, name)
        raise FailedPrecondition(
            f"{volume.field}.uidMappings: the ids of {volume.source!r}, on a file system of type {volume.fs_type}, cannot"
            f" be mapped by this host's kernel: {error.strerror}",
            remedy="put the volume on a file system that can (ext4, XFS, Btrfs, and tmpfs since Linux 6.3), or leave out"
            " hostUsers: false",
        ) from error
    except OSError as error:
        _withdraw(root, name)
        remedy = "volumes need a host kernel of 5.12 or later" if error.errno == errno.ENOSYS else ""
        raise FailedPrecondition(
            f"config.mounts: {', '.join(repr(one.source) for one in volumes)} could not be shared: {error.strerror}",
            remedy=remedy,
        ) from error


@contextlib.contextmanager
def _made_directory(root: Path, name: str) -> Iterator[int]:
    """Make ROOT/NAME and yield a descriptor of it; whoever may enter the share may enter what is in it."""
    (root / name).mkdir(mode=0o700, exist_ok=True)
    with _directory(root, name) as directory:
        status = root.stat()
        os.fchown(directory, -1, status.st_gid)
        os.fchmod(directory, status.st_mode & 0o777)
        yield directory


@contextlib.contextmanager
def _directory(root: Path, name: str) -> Iterator[int]:
    """Yield a descriptor of ROOT/NAME, which is followed nowhere else."""
    directory = os.open(root / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)


def _make_target(directory: int, name: str, volume: SharedVolume) -> None:
    if volume.directory:
        os.mkdir(name, dir_fd=directory)
    else:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory))


def _clone(volume: SharedVolume, namespaces: Mapping[UserNamespace, int]) -> int:
    wanted = volume.mount
    return clone(
        volume.source,
        Flag.SLAVE if wanted.propagation == "rslave" else Flag.PRIVATE,
        readonly=wanted.readonly,
        recursive_readonly=wanted.recursive_readonly,
        ids=-1 if wanted.ids is None else namespaces[wanted.ids],
    )


def _attach(places: list[tuple[int, str]], here: Path) -> None:
    for tree, place in places:
        attach(tree, here / place)


def _withdraw(root: Path, name: str) -> None:
    try:
        with _directory(root, name) as directory:
            for entry in os.listdir(directory):
                _remove_target(directory, entry)
        (root / name).rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise FailedPrecondition(f"the share {root / name} could not be emptied: {error.strerror}") from error


def _remove_target(directory: int, name: str) -> None:
    """Remove a target; when it is a mount point in virtiofsd's namespace, the kernel takes that mount away with it."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if status.st_dev != os.fstat(directory).st_dev:  # a mount of this namespace
        detach(Path(f"/proc/self/fd/{directory}/{name}"))
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        os.rmdir(name, dir_fd=directory)
    else:
        os.unlink(name, dir_fd=directory)


def _where_binds_are(root: Path, server: DetachedProcess | None, function: Callable[[Path], None]) -> None:
    """Call a function with the share's path in the namespace of its binds."""
    if server is None:
        function(root)
    else:
        inside(server, root, lambda: function(Path("/")))
