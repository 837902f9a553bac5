"""Growing a running QEMU: processors and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.qemu.argv import MEMORY, MEMORY_BLOCK_MIB, memory_backend, memory_device
from vmruntime.hypervisor.qmp.monitor import Monitor

MIB = 1024 * 1024
STEP_MIB = 4
"""What Linux plugs in at a time on x86-64: the largest block of its page allocator (drivers/virtio/virtio_mem.c, sb_size)."""


async def plug_cpus(monitor: Monitor, wanted: int) -> None:
    """Plug in processors until there are `wanted`. Not every machine can be asked, and one is always there."""
    if wanted <= 1:
        return
    slots = await monitor.execute("query-hotpluggable-cpus")
    present = [slot for slot in slots if "qom-path" in slot]
    # QEMU lists the last one first; guests number them in the order of their ids.
    free = [slot for slot in reversed(slots) if "qom-path" not in slot]
    missing = wanted - len(present)
    if missing > len(free):
        raise HypervisorError(f"the VM has room for {len(slots)} processors, {wanted} are wanted")
    for slot in free[: max(0, missing)]:
        name = "cpu-" + "-".join(str(value) for value in slot["props"].values())
        await monitor.execute("device_add", {"driver": slot["type"], "id": name, **slot["props"]})


async def set_memory(monitor: Monitor, wanted_mib: int, take_port: Callable[[], int]) -> None:
    """Make the guest's memory so large, in steps of 4 MiB, rounded up.

    The first growth plugs in a virtio-mem device as large as the VM may ever become; from then on its size is changed.
    A guest gives memory back when it can.
    """
    summary = await monitor.execute("query-memory-size-summary")
    base_mib = int(summary["base-memory"]) // MIB
    extra = max(0, wanted_mib - base_mib)
    plugged = -(-extra // STEP_MIB) * STEP_MIB
    device = await _device(monitor)
    if device is None:
        if plugged == 0:
            return
        device = await _plug(monitor, base_mib, take_port)
    limit = int(device["max-size"]) // MIB
    if plugged > limit:
        raise HypervisorError(
            f"the VM can have {base_mib + limit} MiB at most, {wanted_mib} MiB are wanted: it was started with"
            f" {base_mib} MiB on a host that allows no more"
        )
    path = f"/machine/peripheral/{device['id']}"
    await monitor.execute("qom-set", {"path": path, "property": "requested-size", "value": plugged * MIB})


async def _device(monitor: Monitor) -> dict[str, Any] | None:
    for entry in await monitor.execute("query-memory-devices"):
        if entry["type"] == "virtio-mem" and str(entry["data"].get("id", "")).endswith(f"-{MEMORY}"):
            return dict(entry["data"])
    return None


async def _plug(monitor: Monitor, base_mib: int, take_port: Callable[[], int]) -> dict[str, Any]:
    machine = await monitor.execute("qom-get", {"path": "/machine", "property": "memory"})
    growth = (int(machine.get("max-size", 0)) // MIB - base_mib) // MEMORY_BLOCK_MIB * MEMORY_BLOCK_MIB
    if growth <= 0:
        raise HypervisorError(f"the VM was started with {base_mib} MiB and cannot grow")
    await monitor.execute("object-add", memory_backend(growth))
    try:
        await monitor.execute("device_add", memory_device(take_port()))
    except HypervisorError:
        await monitor.execute("object-del", {"id": MEMORY})
        raise
    device = await _device(monitor)
    if device is None:
        raise HypervisorError("the memory device was plugged in but is not listed")
    return device
