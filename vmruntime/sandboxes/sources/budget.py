"""How many VMs may wait for pods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

WARM_MIB = 100
"""What a VM takes of the host that waits for its pod (make bench ONLY=pss_idle_pod)."""

MOST = 4
MEMORY_SHARE = 0.02
"""Of the host's memory that may wait for pods, if nobody says otherwise."""

LOW, ENOUGH = 0.10, 0.15
"""Below the first share of the host's memory nothing is kept waiting, above the second it is again."""

MEMINFO = Path("/proc/meminfo")


def warm_vms(setting: int | Literal["auto"], host_memory_mib: int) -> int:
    """Return how many VMs are to wait for pods.

    Args:
        setting: start.warm; "auto": as many as processors, and no more than 2 % of the memory has room for, at most four.
        host_memory_mib: Of the host.
    """
    if setting != "auto":
        return setting
    return min(MOST, os.cpu_count() or 1, int(host_memory_mib * MEMORY_SHARE) // WARM_MIB)


def memory_available() -> float:
    """Return which share of the host's memory programs can still have (MemAvailable, proc(5))."""
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    total, available = (int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return available / total
