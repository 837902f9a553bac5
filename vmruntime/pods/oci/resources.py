"""Limits, as the guest's cgroup v2 will hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from vmruntime.errors import InvalidArgument
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import SandboxKind

# (type, major, minor, access): what a container may open or make. Any node may be made with mknod, which is what
# CAP_MKNOD is for, but only these opened (Documentation/admin-guide/devices.txt).
_DEVICES: tuple[tuple[str, int | None, int | None, str], ...] = (
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", 1, 3, "rwm"),  # null
    ("c", 1, 5, "rwm"),  # zero
    ("c", 1, 7, "rwm"),  # full
    ("c", 1, 8, "rwm"),  # random
    ("c", 1, 9, "rwm"),  # urandom
    ("c", 5, 0, "rwm"),  # tty
    ("c", 5, 1, "rwm"),  # console
    ("c", 5, 2, "rwm"),  # ptmx
    ("c", 136, None, "rwm"),  # pts
)


def device_rules(*, privileged: bool) -> list[dict[str, Any]]:
    """Return linux.resources.devices; a later rule wins."""
    if privileged:
        return [{"allow": True, "access": "rwm"}]
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for kind, major, minor, access in _DEVICES:
        rule: dict[str, Any] = {"allow": True, "type": kind, "access": access}
        if major is not None:
            rule["major"] = major
        if minor is not None:
            rule["minor"] = minor
        rules.append(rule)
    return rules


def hugetlb_controlled(root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether the host's cgroups, of either version, have a controller for huge pages."""
    try:
        return (root / "hugetlb").is_dir() or "hugetlb" in (root / "cgroup.controllers").read_text().split()
    except OSError:
        return False


def guest_resources(resources: LinuxResources, kind: SandboxKind) -> LinuxResources:
    """Return limits as they make sense where the container runs.

    A VM has processors and memory nodes of its own: the host's numbers mean nothing there, and kubelet's choice of
    processors holds for the VM as a whole through the pod's cgroup on the host. Nor has it huge pages; kubelet
    sends limits of 0 for each size that the host knows.

    Raises:
        InvalidArgument: A VM cannot give what is asked for.
    """
    if kind is not SandboxKind.CONTAINER:
        if hugetlb_controlled():
            return resources
        # Where nothing counts huge pages, limits on them can neither be set nor be exceeded knowingly.
        return msgspec.structs.replace(resources, hugepage_limits={})
    for size, limit in resources.hugepage_limits.items():
        if limit > 0:
            raise InvalidArgument.field(
                "config.linux.resources.hugepage_limits",
                f"{size}: {limit}",
                "cannot be had in a VM: its memory comes from the host's ordinary pages",
                remedy="leave out hugepages, or annotate the pod with vmruntime.io/kind: host",
            )
    return msgspec.structs.replace(resources, cpuset_cpus="", cpuset_mems="", hugepage_limits={})


def resource_limits(resources: LinuxResources) -> dict[str, Any]:
    """Return linux.resources without devices; what was not given is left out."""
    limits: dict[str, Any] = {}
    if cpu := _cpu(resources):
        limits["cpu"] = cpu
    if resources.memory_limit:
        limits["memory"] = {"limit": resources.memory_limit}
        # Memory and swap together. Without a memory limit it means nothing to cgroup v2, and crun refuses it.
        if resources.memory_swap_limit:
            limits["memory"]["swap"] = resources.memory_swap_limit
    if resources.hugepage_limits:
        limits["hugepageLimits"] = [
            {"pageSize": size, "limit": limit} for size, limit in sorted(resources.hugepage_limits.items())
        ]
    unified = dict(resources.unified)
    # The one limit of Kubernetes that has no field in CRI; it has one in the OCI configuration.
    processes = unified.get("pids.max", "")
    if processes.isascii() and processes.isdigit() and len(processes) < 19:
        limits["pids"] = {"limit": int(unified.pop("pids.max"))}
    if unified:
        limits["unified"] = unified
    return limits


def _cpu(resources: LinuxResources) -> dict[str, Any]:
    cpu: dict[str, Any] = {}
    if resources.cpu_shares:
        # The kernel's range for shares, which the conversion to cgroup v2's weight is defined for.
        cpu["shares"] = min(max(resources.cpu_shares, 2), 262144)
    if resources.cpu_quota:
        cpu["quota"] = resources.cpu_quota
    if resources.cpu_period:
        cpu["period"] = resources.cpu_period
    if resources.cpuset_cpus:
        cpu["cpus"] = resources.cpuset_cpus
    if resources.cpuset_mems:
        cpu["mems"] = resources.cpuset_mems
    return cpu
