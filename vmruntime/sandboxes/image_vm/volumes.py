"""Volumes of image pods: directories by a live share, files copied, memory as the guest's own tmpfs.

A guest that has no virtio-fs still gets ConfigMaps and Secrets: their files are written where they belong, and the share is
mounted over them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import InvalidArgument, NotFound
from vmruntime.model.container import Mount
from vmruntime.model.image_pod import DataSource, SourceKind
from vmruntime.sandboxes.vm_volumes import SHARE_TAG
from vmruntime.seed.request import SeedFile, SeedMount, SourceContent
from vmruntime.volumes.survey import MemoryVolume, SharedVolume, mount_field, survey

SHARE_PATH = "/run/vmruntime/share"
"""Where guests mount the pod's share, out of which its volumes are bound to their places."""

FILE_LIMIT = 1024 * 1024
"""Bytes of a file that is copied: as much as a ConfigMap or Secret may have."""

COPY_LIMIT = 256 * 1024
"""Bytes of a volume that is copied as well as shared."""

ATOMIC = "..data"
"""The link by which kubelet swaps all files of a ConfigMap, Secret or projected volume at once."""

KINDS = {SourceKind.CONFIGMAP: "kubernetes.io~configmap", SourceKind.SECRET: "kubernetes.io~secret"}
KUBELET_VOLUMES = "kubernetes.io~"


class GuestVolumes(msgspec.Struct, frozen=True, kw_only=True):
    """A container's mounts as its guest gets them.

    Attributes:
        shared: Those on the share, which numbers them from 0.
        mounts, files: For cloud-init.
    """

    shared: list[Mount] = []
    mounts: list[SeedMount] = []
    files: list[SeedFile] = []


async def guest_volumes(container_id: str, wanted: Sequence[Mount], *, chown: bool) -> GuestVolumes:
    """Look at a container's mounts.

    Args:
        container_id: Names the share's directory.
        wanted: In CRI's order.
        chown: Give everything in the pod's own volumes to root first.

    Raises:
        InvalidArgument: One cannot be had in a VM that boots an image.
    """
    return await in_thread(lambda: _guest_volumes(container_id, wanted, chown=chown))


async def source_content(source: DataSource | None, mounts: Sequence[Mount], annotation: str) -> SourceContent | None:
    """Return the keys of the ConfigMap or Secret that an annotation names; None: it names none.

    A CRI runtime sees no objects, only what kubelet mounts: the volume that has the object's name.

    Raises:
        NotFound: There is no such volume.
        InvalidArgument: It is too large.
    """
    if source is None:
        return None
    for mount in mounts:
        parts = PurePosixPath(mount.host_path).parts
        if KINDS[source.kind] in parts and parts[parts.index(KINDS[source.kind]) + 1 :] == (source.name,):
            return await in_thread(lambda path=Path(mount.host_path): _content(source, path))  # type: ignore[misc]
    raise NotFound(
        f"annotation {annotation}: {source} is not among the container's volumes",
        remedy=f"mount it in the container, by a volume that is named {source.name} as well",
    )


def _guest_volumes(container_id: str, wanted: Sequence[Mount], *, chown: bool) -> GuestVolumes:
    for number, mount in enumerate(wanted):
        if mount.image:
            raise InvalidArgument(
                f"config.mounts[{number}].image: {mount.image!r} cannot be mounted in a pod of kind image",
                remedy="leave it out, or put its files into the VM's image",
            )
    mounts: list[SeedMount] = []
    files: list[SeedFile] = []
    shared: list[Mount] = []
    for number, volume in enumerate(survey(wanted)):
        if isinstance(volume, MemoryVolume):
            mounts.append(_tmpfs(volume))
        elif not volume.directory:
            files += _copied(mount_field(number, volume.mount), volume)
        else:
            if chown and KUBELET_VOLUMES in volume.source and not volume.mount.readonly:
                _give_to_root(volume.source)
            mounts.append(
                SeedMount(
                    source=f"{SHARE_PATH}/{container_id}/{len(shared)}",
                    path=volume.mount.container_path,
                    fstype="none",
                    options="bind,nofail",
                )
            )
            files += _beneath(volume)
            shared.append(volume.mount)
    if shared:
        share = SeedMount(source=SHARE_TAG, path=SHARE_PATH, fstype="virtiofs", options="nofail")
        mounts.insert(0, share)
    return GuestVolumes(shared=shared, mounts=mounts, files=files)


def _tmpfs(volume: MemoryVolume) -> SeedMount:
    size = f"size={volume.size}," if volume.size else ""
    options = f"{size}mode={volume.mode:04o},uid={volume.uid},gid={volume.gid},nofail"
    return SeedMount(source="tmpfs", path=volume.mount.container_path, fstype="tmpfs", options=options)


def _copied(field: str, volume: SharedVolume) -> list[SeedFile]:
    """Return a single file for the guest; of a ConfigMap by subPath, say, which Kubernetes does not update either."""
    if volume.mount.container_path.startswith("/dev/"):
        return []  # the container's termination log, which only a process beside kubelet's files could write
    status = os.stat(volume.source)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument.field(
            f"{field}.host_path", volume.mount.host_path, "is neither a directory nor a file, and no VM could use it"
        )
    if status.st_size > FILE_LIMIT:
        raise InvalidArgument.field(
            f"{field}.host_path",
            volume.mount.host_path,
            f"has {status.st_size} bytes; single files are copied into the VM, up to {FILE_LIMIT}",
            remedy="mount its directory, which is shared",
        )
    content = Path(volume.source).read_bytes()
    return [SeedFile(path=volume.mount.container_path, content=content, mode=stat.S_IMODE(status.st_mode))]


def _beneath(volume: SharedVolume) -> list[SeedFile]:
    """Return copies of what kubelet wrote into a volume, for a guest that cannot mount shares."""
    if not os.path.islink(os.path.join(volume.source, ATOMIC)):
        return []
    found, total = [], 0
    for name, path in _regular(Path(volume.source) / ATOMIC):
        status = path.stat()
        total += status.st_size
        if total > COPY_LIMIT:
            return []
        place = f"{volume.mount.container_path.rstrip('/')}/{name}"
        mode = stat.S_IMODE(status.st_mode)
        found.append(SeedFile(path=place, content=path.read_bytes(), mode=mode, covered=True))
    return found


def _regular(root: Path) -> Iterator[tuple[str, Path]]:
    """Iterate over regular files below a directory, by their relative names; links lead nowhere."""
    for directory, directories, names in os.walk(root):
        directories.sort()
        for name in sorted(names):
            path = Path(directory) / name
            if stat.S_ISREG(path.lstat().st_mode):
                yield str(path.relative_to(root)), path


def _content(source: DataSource, directory: Path) -> SourceContent:
    content, total = {}, 0
    real = directory / ATOMIC if (directory / ATOMIC).is_dir() else directory
    for name, path in _regular(real):
        total += path.stat().st_size
        if total > FILE_LIMIT:
            raise InvalidArgument(f"{source} has more than {FILE_LIMIT} bytes")
        content[name] = path.read_bytes()
    return content


def _give_to_root(directory: str) -> None:
    """Make root the owner of everything in a volume of kubelet's. Links are not followed."""
    for _, directories, names, descriptor in os.fwalk(directory, follow_symlinks=False):
        for name in (*directories, *names):
            os.chown(name, 0, 0, dir_fd=descriptor, follow_symlinks=False)
    os.chown(directory, 0, 0)
