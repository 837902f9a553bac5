"""Growing a VM, against a monitor that remembers."""

from __future__ import annotations

from typing import Any, cast

import pytest

from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.qemu.monitor import Monitor
from vmruntime.hypervisor.qemu.resize import plug_cpus, set_memory

MIB = 1024 * 1024


class FakeMonitor:
    """A VM with 1 of 2 processors and 256 of 768 MiB."""

    def __init__(self, max_size: int = 768 * MIB) -> None:
        self.max_size = max_size
        self.cpus = [
            {"props": {"core-id": 1}, "type": "cpu"},
            {"props": {"core-id": 0}, "type": "cpu", "qom-path": "/c"},
        ]
        self.memory: list[dict[str, Any]] = []
        self.done: list[tuple[str, dict[str, Any]]] = []

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        arguments = arguments or {}
        match command:
            case "query-hotpluggable-cpus":
                return self.cpus
            case "query-memory-size-summary":
                return {"base-memory": 256 * MIB}
            case "query-memory-devices":
                return self.memory
            case "qom-get":
                return {"max-size": self.max_size}
        self.done.append((command, arguments))
        if arguments.get("driver") == "virtio-mem-pci":
            self.memory = [{"type": "virtio-mem", "data": {"id": arguments["id"], "max-size": 512 * MIB}}]
        return None


def port() -> int:
    return 3


async def test_memory_is_plugged_in_once_and_changed_in_steps() -> None:
    fake = FakeMonitor()
    monitor = cast(Monitor, fake)
    await set_memory(monitor, 256, port)
    assert fake.done == []
    for wanted, requested in ((300, 44), (301, 48), (512, 256), (100, 0)):
        await set_memory(monitor, wanted, port)
        assert fake.done[-1][1]["value"] == requested * MIB
    assert [command for command, _ in fake.done].count("object-add") == 1
    with pytest.raises(HypervisorError, match="768 MiB at most, 1024 MiB are wanted"):
        await set_memory(monitor, 1024, port)


async def test_a_vm_without_room_says_so() -> None:
    with pytest.raises(HypervisorError, match="cannot grow"):
        await set_memory(cast(Monitor, FakeMonitor(max_size=256 * MIB)), 300, port)
    with pytest.raises(HypervisorError, match="room for 2 processors, 3 are wanted"):
        await plug_cpus(cast(Monitor, FakeMonitor()), 3)


async def test_missing_processors_are_plugged_in() -> None:
    fake = FakeMonitor()
    await plug_cpus(cast(Monitor, fake), 1)
    assert fake.done == []
    await plug_cpus(cast(Monitor, fake), 2)
    assert fake.done == [("device_add", {"driver": "cpu", "id": "cpu-1", "core-id": 1})]
