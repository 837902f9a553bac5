"""CPU, memory and other limits."""

from __future__ import annotations

import re

from vmruntime.cri.translate.checks import bad, number, required, text
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.resources import LinuxResources

_CPUSET = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_PAGE_SIZE = re.compile(r"[1-9]\d*[KMGT]B")
# A file of a cgroup v2 directory, always CONTROLLER.NAME.
_UNIFIED = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)+")


def resources_from_cri(name: str, message: cri.LinuxContainerResources) -> LinuxResources:
    """Translate LinuxContainerResources; `name` is the field's own name, for messages.

    Raises:
        InvalidArgument: A limit cannot be used.
    """
    return LinuxResources(
        cpu_period=_period(f"{name}.cpu_period", message.cpu_period),
        # -1 lifts the limit, as in the cgroup file it comes from.
        cpu_quota=number(f"{name}.cpu_quota", message.cpu_quota, low=-1),
        cpu_shares=number(f"{name}.cpu_shares", message.cpu_shares),
        memory_limit=number(f"{name}.memory_limit_in_bytes", message.memory_limit_in_bytes),
        memory_swap_limit=number(f"{name}.memory_swap_limit_in_bytes", message.memory_swap_limit_in_bytes, low=-1),
        oom_score_adj=number(f"{name}.oom_score_adj", message.oom_score_adj, low=-1000, high=1000),
        cpuset_cpus=_cpuset(f"{name}.cpuset_cpus", message.cpuset_cpus),
        cpuset_mems=_cpuset(f"{name}.cpuset_mems", message.cpuset_mems),
        hugepage_limits=_hugepages(f"{name}.hugepage_limits", message),
        unified=_unified(f"{name}.unified", message),
    )


def resources_to_cri(resources: LinuxResources) -> cri.LinuxContainerResources:
    """Translate back, for ContainerStatus."""
    return cri.LinuxContainerResources(
        cpu_period=resources.cpu_period,
        cpu_quota=resources.cpu_quota,
        cpu_shares=resources.cpu_shares,
        memory_limit_in_bytes=resources.memory_limit,
        memory_swap_limit_in_bytes=resources.memory_swap_limit,
        oom_score_adj=resources.oom_score_adj,
        cpuset_cpus=resources.cpuset_cpus,
        cpuset_mems=resources.cpuset_mems,
        hugepage_limits=[
            cri.HugepageLimit(page_size=size, limit=limit) for size, limit in resources.hugepage_limits.items()
        ],
        unified=resources.unified,
    )


def _period(name: str, value: int) -> int:
    # The kernel's own bounds, 1 ms to 1 s (Documentation/scheduler/sched-bwc.rst).
    return 0 if value == 0 else number(name, value, low=1000, high=1_000_000)


def _cpuset(name: str, value: str) -> str:
    if value and not _CPUSET.fullmatch(text(name, value)):
        raise bad(name, value, "is not a list such as 0-2,4")
    return value


def _hugepages(name: str, message: cri.LinuxContainerResources) -> dict[str, int]:
    limits: dict[str, int] = {}
    for i, entry in enumerate(message.hugepage_limits):
        size = required(f"{name}[{i}].page_size", entry.page_size)
        if not _PAGE_SIZE.fullmatch(size):
            raise bad(f"{name}[{i}].page_size", size, "is not a page size such as 2MB")
        if size in limits:
            raise bad(f"{name}[{i}].page_size", size, "is given twice")
        # The kernel's counters are signed; a larger limit is no limit.
        limits[size] = min(entry.limit, 2**63 - 1)
    return limits


def _unified(name: str, message: cri.LinuxContainerResources) -> dict[str, str]:
    for key, value in message.unified.items():
        if len(key) > 128 or not _UNIFIED.fullmatch(key):
            raise bad(name, key, "is not the name of a cgroup v2 file, such as memory.high")
        text(f"{name}[{key}]", value)
        if key.startswith("cgroup."):
            # Moving processes, freezing or killing is not a limit.
            raise bad(name, key, "is not a resource limit")
    return dict(message.unified)
