"""CPU, memory and other limits."""

from __future__ import annotations

import msgspec


class LinuxResources(msgspec.Struct, frozen=True, kw_only=True):
    """CRI's LinuxContainerResources; 0 or empty means not given.

    Attributes:
        cpu_period: Microseconds.
        cpu_quota: Microseconds per period.
        memory_limit: Bytes.
        memory_swap_limit: Bytes, memory and swap together.
        hugepage_limits: Page size such as "2MB" to bytes.
        unified: cgroup v2 file names to values.
    """

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: dict[str, int] = {}
    unified: dict[str, str] = {}
    memory_swap_limit: int = 0


class VmSize(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a virtual machine.

    Attributes:
        max_vcpus, max_memory_mib: What it may grow to while it runs; 0: it cannot.
    """

    vcpus: int
    memory_mib: int
    max_vcpus: int = 0
    max_memory_mib: int = 0
