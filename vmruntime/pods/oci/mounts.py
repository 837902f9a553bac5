"""The mounts of a container: those every container has, and its volumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import msgspec


class BindMount(msgspec.Struct, frozen=True, kw_only=True):
    """A volume as the OCI runtime mounts it; `propagation` is private, rslave or rshared, `options` are more flags."""

    destination: str
    source: str
    readonly: bool
    propagation: str = "private"
    recursive_readonly: bool = False
    options: list[str] = []


def root_propagation(volumes: Sequence[BindMount]) -> str:
    """Return linux.rootfsPropagation: mounts pass in or out only through a root that lets them."""
    wanted = {volume.propagation for volume in volumes}
    return "rshared" if "rshared" in wanted else "rslave" if "rslave" in wanted else "rprivate"


def container_mounts(
    volumes: Sequence[BindMount], *, privileged: bool, user_namespace: bool = False
) -> list[dict[str, Any]]:
    """Return linux.mounts: the kernel's file systems, unless a volume takes their place, then volumes, parents first."""
    taken = {PurePosixPath(volume.destination) for volume in volumes}
    kernel = [
        mount for mount in kernel_mounts(privileged=privileged) if PurePosixPath(mount["destination"]) not in taken
    ]
    # A stable sort: of two mounts on one place the later one wins, as mount(2) has it.
    ordered = sorted(volumes, key=lambda volume: len(PurePosixPath(volume.destination).parts))
    return kernel + [_bind(volume, user_namespace=user_namespace) for volume in ordered]


def kernel_mounts(*, privileged: bool) -> list[dict[str, Any]]:
    """Return the mounts every container has. A privileged one may change sysfs and its cgroup."""
    access = "rw" if privileged else "ro"
    return [
        _mount("/proc", "proc", ["nosuid", "noexec", "nodev"]),
        _mount("/dev", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount("/dev/pts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        _mount("/dev/mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
        _mount("/sys", "sysfs", ["nosuid", "noexec", "nodev", access]),
        # crun mounts cgroup v2 for this type wherever the guest has no v1.
        _mount("/sys/fs/cgroup", "cgroup", ["nosuid", "noexec", "nodev", "relatime", access]),
    ]


def _bind(volume: BindMount, *, user_namespace: bool) -> dict[str, Any]:
    propagation = "rprivate" if volume.propagation == "private" else volume.propagation
    # rro is of the OCI runtime specification 1.1: the mounts below as well.
    access = "rw" if not volume.readonly else "rro" if volume.recursive_readonly else "ro"
    # In a user namespace crun (1.8) leaves out other flags than ro, except where they are to hold for the mounts below, too.
    flags = [f"r{option}" for option in volume.options] if user_namespace else volume.options
    options = ["rbind", propagation, access, *flags]
    return {"destination": volume.destination, "type": "bind", "source": volume.source, "options": options}


def _mount(destination: str, kind: str, options: list[str]) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": options}
