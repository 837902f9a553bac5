"""The pod's cgroup on the host: QEMU and its helpers in one place under the parent kubelet names.

Works on cgroup v2 and on v1 (and the hybrid of both): where each controller is mounted is read from
/proc/self/mountinfo (cgroups(7)). Limits come from the parent, which kubelet sizes for the whole pod.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import Internal, InvalidArgument

V1_CONTROLLERS = frozenset({"cpu", "cpuacct", "memory", "pids", "blkio", "freezer"})
"""cpuset is left out: a v1 cpuset takes no process until its CPUs are set, and kubelet's parent already limits them."""


def cgroup_path(parent: str, sandbox_id: str) -> str:
    """Return a pod's cgroup relative to each hierarchy's root.

    Args:
        parent: As kubelet gives it: a path (cgroupfs driver), or a slice such as kubepods-burstable-podX.slice, which
            systemd nests as kubepods.slice/kubepods-burstable.slice/… (systemd.slice(5)).
        sandbox_id: Names the cgroup itself.

    Raises:
        InvalidArgument: The parent would leave the hierarchy.
    """
    parts = [part for part in parent.split("/") if part]
    if ".." in parts or "\x00" in parent:
        raise InvalidArgument.field("linux.cgroup_parent", parent, "is not a cgroup path")
    if len(parts) == 1 and parts[0].endswith(".slice"):
        parts = _nested_slices(parts[0])
    return "/".join([*parts, f"vmruntime-{sandbox_id}"])


def _nested_slices(slice_name: str) -> list[str]:
    names = slice_name.removesuffix(".slice").split("-")
    return ["-".join(names[: depth + 1]) + ".slice" for depth in range(len(names))]


class HostCgroups:
    """The host's cgroup hierarchies that vmruntime uses."""

    def __init__(self, hierarchies: list[Path]) -> None:
        self._hierarchies = hierarchies

    @classmethod
    def detect(cls, mountinfo: Path = Path("/proc/self/mountinfo")) -> HostCgroups:
        """Find where cgroups are mounted; a host without any gets no pod cgroups."""
        found: list[Path] = []
        for line in mountinfo.read_text().splitlines():
            left, _, right = line.partition(" - ")
            mount_point = Path(left.split()[4])
            kind, _, options = right.split(" ", 2)
            is_v1 = kind == "cgroup" and bool(V1_CONTROLLERS & set(options.split(",")))
            if (kind == "cgroup2" or is_v1) and mount_point not in found:
                found.append(mount_point)
        return cls(found)

    async def create(self, path: str) -> None:
        """Make a cgroup in every hierarchy; existing ones are kept.

        Raises:
            Internal: The kernel refused.
        """
        await in_thread(lambda: self._create(path))

    async def add(self, path: str, pid: int) -> None:
        """Move a process into a cgroup."""
        await in_thread(lambda: self._add(path, pid))

    async def remove(self, path: str) -> None:
        """Remove a cgroup, once its processes are gone; missing: success."""
        for _ in range(100):
            if await in_thread(lambda: self._remove(path)):
                return
            await asyncio.sleep(0.02)  # a process that was killed leaves its cgroup a moment later
        raise Internal(f"the cgroup {path} still has processes")

    def _create(self, path: str) -> None:
        for hierarchy in self._hierarchies:
            try:
                (hierarchy / path).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Internal(f"the cgroup {hierarchy / path} cannot be made: {error.strerror}") from error

    def _add(self, path: str, pid: int) -> None:
        for hierarchy in self._hierarchies:
            try:
                (hierarchy / path / "cgroup.procs").write_text(str(pid))
            except OSError as error:
                raise Internal(f"process {pid} cannot enter {hierarchy / path}: {error.strerror}") from error

    def _remove(self, path: str) -> bool:
        gone = True
        for hierarchy in self._hierarchies:
            try:
                (hierarchy / path).rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                gone = False
                continue
            self._remove_empty_default_parent(hierarchy, path)
        return gone

    def _remove_empty_default_parent(self, hierarchy: Path, path: str) -> None:
        """The parent that vmruntime made for pods without one goes with its last pod; kubelet's are kubelet's."""
        parent = Path(path).parent
        if parent.name == "vmruntime":
            with contextlib.suppress(OSError):
                (hierarchy / parent).rmdir()
