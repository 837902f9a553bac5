"""What an image pod uses: seen from the host, by QEMU's cgroup, the guest's balloon, the taps and the disk's file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmruntime.model.sandbox import NetworkInterface, PodNetwork
from vmruntime.model.stats import ContainerUsage, GuestUsage, HostUsage, InterfaceUsage
from vmruntime.network import netns

BLOCK = 512
"""Bytes of what stat(2) counts as a block."""


async def interface_usage(network: PodNetwork | None) -> list[InterfaceUsage]:
    """Return the counters of a pod's interfaces, as the guest would: what its tap has sent, it has received."""
    if network is None or not network.interfaces:
        return []
    try:
        text = await netns.inside(Path(network.netns), lambda: Path("/proc/thread-self/net/dev").read_text())
    except OSError:
        return []  # the pod's network is being taken away
    return counters(text, network.interfaces)


def counters(text: str, interfaces: Sequence[NetworkInterface]) -> list[InterfaceUsage]:
    """Return interfaces' counters from the text of proc(5)'s net/dev of their namespace."""
    lines = {name.strip(): rest.split() for name, _, rest in (line.partition(":") for line in text.splitlines()[2:])}
    found = []
    for nic in interfaces:
        numbers = [int(word) for word in lines.get(nic.tap, [])]
        if len(numbers) < 12:
            continue
        # The tap's own view is the other one: it sends what the guest receives.
        found.append(
            InterfaceUsage(
                name=nic.name,
                tx_bytes=numbers[0],
                tx_packets=numbers[1],
                tx_errors=numbers[2],
                tx_dropped=numbers[3],
                rx_bytes=numbers[8],
                rx_packets=numbers[9],
                rx_errors=numbers[10],
                rx_dropped=numbers[11],
            )
        )
    return found


def machine_usage(
    container_id: str, time: int, host: HostUsage, memory: Mapping[str, int], size: int, root: Path
) -> ContainerUsage:
    """Return what the machine uses.

    Args:
        container_id: Whose it is.
        time: Nanoseconds since the epoch.
        host: Of the pod's cgroup.
        memory: What the guest's balloon driver says, in bytes; empty: nothing, and the host's view counts.
        size: Bytes of memory that the machine has.
        root: Its writable disk's file.
    """
    total = min(memory.get("stat-total-memory", 0), size)
    free = memory.get("stat-free-memory", 0)
    available = memory.get("stat-available-memory", free)
    known = 0 < available <= total and free <= total
    return ContainerUsage(
        id=container_id,
        time=time,
        cpu_ns=host.cpu_ns,
        memory_usage=total - free if known else host.memory_usage,
        memory_working_set=total - available if known else host.memory_working_set,
        memory_rss=total - available if known else host.memory_rss,
        memory_limit=size,
        page_faults=host.page_faults,
        major_page_faults=memory.get("stat-major-faults", 0),
        writable_bytes=_allocated(root),
        writable_inodes=1,
        processes=1,
    )


def sandbox_usage(
    time: int, containers: Sequence[ContainerUsage], interfaces: Sequence[InterfaceUsage], memory: Mapping[str, int]
) -> GuestUsage:
    """Return what the guest uses in all."""
    total = memory.get("stat-total-memory", 0)
    available = min(memory.get("stat-available-memory", memory.get("stat-free-memory", 0)), total)
    return GuestUsage(
        time=time,
        containers=list(containers),
        interfaces=list(interfaces),
        memory_total=total,
        memory_available=available,
    )


def _allocated(path: Path) -> int:
    try:
        return os.stat(path).st_blocks * BLOCK
    except OSError:
        return 0
