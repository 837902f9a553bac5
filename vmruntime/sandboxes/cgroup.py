"""The pod's cgroup on the host: QEMU and its helpers in one place under the parent kubelet names.

Works on cgroup v2 and on v1 (and the hybrid of both): where each controller is mounted is read from
/proc/self/mountinfo (cgroups(7)). Limits come from the parent, which kubelet sizes for the whole pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import Internal, InvalidArgument
from vmruntime.model.stats import HostUsage

V1_CONTROLLERS = frozenset({"cpu", "cpuacct", "memory", "pids", "blkio", "freezer"})
"""cpuset is left out: a v1 cpuset takes no process until its CPUs are set, and kubelet's parent already limits them."""


CPU_SHARES = {"cpu.weight": (1, 100), "cpu.shares": (2, 1024)}
"""The least and the usual value, of cgroup version 2 (cgroup-v2.rst) and 1."""

UNIFIED = Path("/sys/fs/cgroup/unified")
"""Where hosts with both versions of cgroups mount version 2."""


def is_hybrid(unified: Path = UNIFIED) -> bool:
    """Whether the host has both versions, and version 2 with a controller of its own."""
    try:
        return bool((unified / "cgroup.controllers").read_text().strip())
    except OSError:
        return False


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

    def __init__(self, hierarchies: list[Path], others: Sequence[Path] = ()) -> None:
        """Take the hierarchies that pods' own processes enter, and others where an OCI runtime makes groups as well."""
        self._hierarchies = hierarchies
        self._all = [*hierarchies, *others]

    @classmethod
    def detect(cls, mountinfo: Path = Path("/proc/self/mountinfo")) -> HostCgroups:
        """Find where cgroups are mounted; a host without any gets no pod cgroups."""
        found: list[Path] = []
        others: list[Path] = []
        for line in mountinfo.read_text().splitlines():
            left, _, right = line.partition(" - ")
            mount_point = Path(left.split()[4])
            kind, _, options = right.split(" ", 2)
            is_v1 = kind == "cgroup" and bool(V1_CONTROLLERS & set(options.split(",")))
            if (kind == "cgroup2" or is_v1) and mount_point not in found:
                found.append(mount_point)
            elif kind == "cgroup" and mount_point not in (*found, *others):
                others.append(mount_point)
        return cls(found, others)

    async def create(self, path: str) -> None:
        """Make a cgroup in every hierarchy; existing ones are kept.

        Raises:
            Internal: The kernel refused.
        """
        await in_thread(lambda: self._create(path))

    async def add(self, path: str, pid: int) -> None:
        """Move a process into a cgroup."""
        await in_thread(lambda: self._add(path, pid))

    async def set_low(self, path: str, *, low: bool) -> None:
        """Give a cgroup's processes the least share of the processors, or the usual one; a host may have none to set."""
        await in_thread(lambda: self._set_low(path, low=low))

    async def memory_limit(self, path: str) -> int | None:
        """Return the lowest limit of a cgroup and those above it, in bytes; None: there is none."""
        return await in_thread(lambda: _memory_limit(self._hierarchies, path))

    async def usage(self, path: str) -> HostUsage:
        """Return what the processes of a cgroup have used; a controller the host does not have counts as 0."""
        return await in_thread(lambda: read_usage([hierarchy / path for hierarchy in self._hierarchies]))

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

    def _set_low(self, path: str, *, low: bool) -> None:
        for hierarchy in self._hierarchies:
            for name, (least, usual) in CPU_SHARES.items():
                file = hierarchy / path / name
                with contextlib.suppress(OSError):  # a file that cgroupfs does not have cannot be made
                    file.write_text(str(least if low else usual))

    def _remove(self, path: str) -> bool:
        gone = True
        for hierarchy in self._all:
            try:
                _end_processes(hierarchy / path)
                _remove_below(hierarchy / path)
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


def _end_processes(group: Path) -> None:
    """Kill what is still in a cgroup that is ours, such as containers of a host pod whose agent is gone."""
    for file in group.rglob("cgroup.procs"):
        for pid in file.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _remove_below(group: Path) -> None:
    for directory in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
        directory.rmdir()


def _memory_limit(hierarchies: Sequence[Path], path: str) -> int | None:
    limits = []
    for hierarchy in hierarchies:
        for group in (Path(path), *Path(path).parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((hierarchy / group / name).read_text()))
    # Version 1 says "none" by the largest number of whole pages.
    return min((limit for limit in limits if limit < 1 << 62), default=None)


def read_usage(directories: Sequence[Path]) -> HostUsage:
    """Read one cgroup in each hierarchy: v2's files (cgroup-v2.rst), else v1's (cgroup-v1/memory.rst, cpuacct.rst)."""
    files = _Files(directories)
    v2_cpu = files.table("cpu.stat").get("usage_usec")
    stat = files.table("memory.stat")
    memory = files.number("memory.current") or files.number("memory.usage_in_bytes")
    inactive = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return HostUsage(
        cpu_ns=v2_cpu * 1000 if v2_cpu is not None else files.number("cpuacct.usage"),
        memory_usage=memory,
        memory_working_set=max(0, memory - inactive),
        memory_rss=stat.get("anon", stat.get("total_rss", 0)),
        page_faults=stat.get("total_pgfault", stat.get("pgfault", 0)),
        major_page_faults=stat.get("total_pgmajfault", stat.get("pgmajfault", 0)),
        processes=max((_count(directory) for directory in directories), default=0),
    )


def _count(group: Path) -> int:
    """Return how many processes are in a cgroup and those below."""
    total = 0
    for file in group.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            total += len(file.read_text().split())
    return total


class _Files:
    """The files of one cgroup, wherever its hierarchies are."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories

    def text(self, name: str) -> str:
        for directory in self._directories:
            with contextlib.suppress(OSError):
                return (directory / name).read_text()
        return ""

    def number(self, name: str) -> int:
        text = self.text(name).strip()
        return int(text) if text.isdecimal() else 0

    def table(self, name: str) -> dict[str, int]:
        pairs = (line.split() for line in self.text(name).splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
