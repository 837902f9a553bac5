"""What the guest's balloon driver says of its memory."""

from __future__ import annotations

import time

from vmruntime.hypervisor.qmp.monitor import Monitor

DEVICES = "/machine/peripheral"
POLL_SECONDS = 3
STALE_SECONDS = 30.0
MOST = 1 << 62
"""More than anything counted; what the guest leaves out is 2^64 - 1."""

AMOUNTS = frozenset({"stat-free-memory", "stat-total-memory", "stat-available-memory", "stat-disk-caches"})
"""Parts of the guest's memory, so never more than it has."""


async def poll_balloon(monitor: Monitor, device: str) -> None:
    """Have QEMU ask the guest from now on.

    Args:
        monitor: QEMU's.
        device: The balloon's id.
    """
    arguments = {"path": f"{DEVICES}/{device}", "property": "guest-stats-polling-interval", "value": POLL_SECONDS}
    await monitor.execute("qom-set", arguments)


async def balloon_stats(monitor: Monitor, device: str) -> dict[str, int]:
    """Return what the guest said last; empty: nothing, or too long ago."""
    answer = await monitor.execute("qom-get", {"path": f"{DEVICES}/{device}", "property": "guest-stats"})
    if time.time() - int(answer["last-update"]) > STALE_SECONDS:
        return {}
    summary = await monitor.execute("query-memory-size-summary")
    memory = int(summary["base-memory"]) + int(summary.get("plugged-memory", 0))
    return {
        str(name): min(int(value), memory) if name in AMOUNTS else int(value)
        for name, value in answer["stats"].items()
        if 0 <= int(value) < MOST
    }
