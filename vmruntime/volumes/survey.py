"""What each mount of a container is on this host, before anything is made of it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vmruntime.errors import FailedPrecondition, InvalidArgument, Unimplemented
from vmruntime.model.container import Mount
from vmruntime.model.sandbox import IdMapping
from vmruntime.volumes.mounting import MountEntry, is_below, mounts

# kubelet's directory of emptyDir volumes, pkg/volume/emptydir; with medium Memory it mounts a tmpfs there.
EMPTY_DIR = "kubernetes.io~empty-dir"
NOBODY = 65534  # /proc/sys/kernel/overflowuid


class SharedVolume(msgspec.Struct, frozen=True, kw_only=True):
    """A file or directory of the host that the guest sees through the share.

    Attributes:
        field: The mount's name in the request, for messages.
        source: Host path without symbolic links.
        fs_type: Of the file system that holds it.
        directory: Whether it is one.
        guest_readonly: Whether the guest may mount it read-only: it makes everything below read-only as well, which
            must not happen to mounts below that are writable on the host.
    """

    field: str
    mount: Mount
    source: str
    fs_type: str
    directory: bool
    guest_readonly: bool


class MemoryVolume(msgspec.Struct, frozen=True, kw_only=True):
    """An emptyDir in memory: a tmpfs of the guest, shared by the pod's containers.

    Attributes:
        key: The same for all mounts of one volume.
        sub_path: The part of it that is mounted, relative; empty: all.
        size: Bytes; 0: no limit of its own.
        uid, gid, mode: Of its root directory, which kubelet gives the pod's fsGroup.
    """

    mount: Mount
    key: str
    sub_path: str
    size: int
    uid: int
    gid: int
    mode: int


Volume = SharedVolume | MemoryVolume


def survey(wanted: Sequence[Mount]) -> list[Volume]:
    """Look at a container's mounts, in their order; image volumes are somebody else's and left out. Blocks.

    A host path that is missing is made a directory, as other runtimes do.

    Raises:
        InvalidArgument: A host path cannot be used.
        Unimplemented: A mount asks for what a VM cannot have.
        FailedPrecondition: The host's kernel or mount cannot do what is asked.
    """
    entries = mounts()
    return [_look(mount_field(i, mount), mount, entries) for i, mount in enumerate(wanted) if not mount.image]


def mount_field(number: int, mount: Mount) -> str:
    """Return a mount's name in the request."""
    return mount.field or f"config.mounts[{number}]"


def _look(field: str, mount: Mount, entries: list[MountEntry]) -> Volume:
    if mount.propagation == "rshared":
        raise Unimplemented(
            f"{field}.propagation: PROPAGATION_BIDIRECTIONAL for {mount.container_path!r}: mounts that a container in a"
            " VM makes cannot appear on the host",
            remedy="annotate the pod with vmruntime.io/kind: host, or use HostToContainer",
        )
    source = host_path(field, mount)
    return _memory_volume(mount, source, entries) or shared_volume(field, mount, source, entries)


def shared_volume(field: str, mount: Mount, source: str, entries: Sequence[MountEntry] | None = None) -> SharedVolume:
    """Return an existing path of the host as a volume. Blocks.

    Args:
        field: The mount's name in the request.
        mount: The mount.
        source: Its host path without symbolic links.
        entries: The host's mounts, when they are known already.

    Raises:
        FailedPrecondition: The host's mount cannot do what is asked.
    """
    entries = mounts() if entries is None else entries
    holder = _holder(source, entries)
    if mount.propagation == "rslave" and not holder.receives:
        raise FailedPrecondition(
            f"{field}.propagation: PROPAGATION_HOST_TO_CONTAINER for {mount.host_path!r}: it lies on a private mount, from"
            " which nothing propagates",
            remedy=f"mount --make-rshared {holder.mount_point}",
        )
    submounts = any(is_below(entry.mount_point, source) for entry in entries)
    return SharedVolume(
        field=field,
        mount=mount,
        source=source,
        fs_type=holder.fs_type,
        directory=stat.S_ISDIR(os.stat(source).st_mode),
        guest_readonly=mount.readonly
        and (mount.recursive_readonly or (mount.propagation == "private" and not submounts)),
    )


def _memory_volume(mount: Mount, source: str, entries: list[MountEntry]) -> MemoryVolume | None:
    """Tell whether a path lies in an emptyDir in memory, which kubelet mounts once and may bind parts of elsewhere."""
    here = _holder(source, entries)
    if here.fs_type != "tmpfs":
        return None
    for entry in entries:
        if entry.device == here.device and entry.root == "/" and EMPTY_DIR in entry.mount_point.split("/"):
            inside = os.path.join(here.root, source[len(here.mount_point) :].lstrip("/"))
            sub_path = os.path.normpath(inside).strip("/")
            root = os.stat(entry.mount_point)
            return MemoryVolume(
                mount=mount,
                key=volume_key(entry.mount_point),
                sub_path=sub_path,
                size=_tmpfs_size(entry.mount_point),
                uid=root.st_uid if mount.ids is None else _outside(mount.ids.uids, root.st_uid),
                gid=root.st_gid if mount.ids is None else _outside(mount.ids.gids, root.st_gid),
                mode=stat.S_IMODE(root.st_mode),
            )
    return None


def _outside(mapping: IdMapping, owner: int) -> int:
    """Return the owner that a file has through an id-mapped mount: an id that is not mapped is nobody's."""
    outside = mapping.outside(owner)
    return NOBODY if outside is None else outside


def _holder(path: str, entries: Sequence[MountEntry]) -> MountEntry:
    """Return the mount that a path lies on."""
    holding = [entry for entry in entries if path == entry.mount_point or is_below(path, entry.mount_point)]
    # Of several on one place the last one covers the others.
    return max(reversed(holding), key=lambda entry: len(entry.mount_point))


def volume_key(source: str) -> str:
    """Return a name for a volume that is the same in all containers of a pod."""
    return hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()[:16]


def host_path(field: str, mount: Mount) -> str:
    """Return a mount's path of the host without symbolic links; a missing one is made a directory. Blocks.

    Raises:
        InvalidArgument: It cannot be used, or has to exist and does not.
    """
    field, path = field if mount.field else f"{field}.host_path", mount.host_path
    try:
        source = os.path.realpath(path)
        if not os.path.lexists(source) and not mount.must_exist:
            Path(source).mkdir(mode=0o755, parents=True, exist_ok=True)
        os.stat(source)
        return source
    except OSError as error:
        raise InvalidArgument.field(field, path, f"cannot be used: {error.strerror}") from error


def _tmpfs_size(path: str) -> int:
    """Return the limit of a tmpfs; one without a limit of its own has half the host's memory, which means none here."""
    facts = os.statvfs(path)
    size = facts.f_blocks * facts.f_frsize
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return size if 0 < size < half * 95 // 100 else 0
