"""Disks that come and go, against a monitor that remembers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Backing, Disk, VmHandle
from vmruntime.hypervisor.qemu.machine_argv import PORTS
from vmruntime.hypervisor.qemu.monitor import Monitor
from vmruntime.hypervisor.qemu.vm import QemuVm
from vmruntime.hypervisor.qmp import devices as module
from vmruntime.model.image_pod import DiskDriver


class FakeMonitor:
    """Answers in QEMU's words; a guest that is slow lets go of a device only when it is told to."""

    def __init__(self) -> None:
        self.devices: set[str] = set()
        self.nodes: set[str] = set()
        self.fdsets: dict[int, str] = {}
        self.slow = False
        self.unplugging: set[str] = set()
        self.ending = False  # the device is not found any more, and has its node until it is told as deleted
        self.gone = asyncio.Condition()

    async def execute_with_fd(self, command: str, arguments: dict[str, Any], fd: int) -> Any:
        os.fstat(fd)
        self.fdsets[len(self.fdsets)] = arguments["opaque"]
        return {"fdset-id": len(self.fdsets) - 1}

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        arguments = arguments or {}
        if command == "device_add":
            self.devices.add(arguments["id"])
        elif command == "blockdev-add":
            if arguments["node-name"] in self.nodes:
                raise HypervisorError("QEMU refused blockdev-add: Duplicate nodes")
            self.nodes.add(arguments["node-name"])
        elif command == "device_del":
            device = arguments["id"]
            if device not in self.devices:
                raise HypervisorError(f"QEMU refused device_del: Device '{device}' not found")
            if device in self.unplugging:
                raise HypervisorError(f"QEMU refused device_del: Device {device} is already in the process of unplug")
            self.unplugging.add(device)
            if not self.slow:
                await self.let_go()
        elif command == "blockdev-del":
            if arguments["node-name"] not in self.nodes:
                raise HypervisorError(f"QEMU refused blockdev-del: Failed to find node with node-name='{arguments}'")
            if self.ending:
                raise HypervisorError("QEMU refused blockdev-del: Node x is in use")
            self.nodes.remove(arguments["node-name"])
        elif command == "qom-list":
            return [{"name": name} for name in sorted(self.devices)]
        elif command == "query-fdsets":
            return [{"fdset-id": key, "fds": [{"opaque": value}]} for key, value in self.fdsets.items()]
        elif command == "remove-fd":
            del self.fdsets[arguments["fdset-id"]]
        return {}

    async def let_go(self) -> None:
        async with self.gone:
            self.devices -= self.unplugging
            self.gone.notify_all()

    @contextlib.contextmanager
    def listen_deleted(self, device: str) -> Iterator[Callable[[float], Awaitable[bool]]]:
        async def deleted(timeout: float) -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout), self.gone:
                    await self.gone.wait_for(lambda: device not in self.devices and not self.ending)
                    self.unplugging.discard(device)
                    return True
            return False

        yield deleted


@pytest.fixture
def monitor() -> FakeMonitor:
    return FakeMonitor()


@pytest.fixture
def vm(monitor: FakeMonitor, tmp_path: Path) -> QemuVm:
    identity = ProcessIdentity(pid=1, start_time=1)
    handle = VmHandle(id="v", driver="qemu", process=identity, helpers=[], directory=str(tmp_path), cid=3, vsock="")
    return QemuVm(handle, DetachedProcess(identity), [], cast(Monitor, monitor))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\0" * 512)
    return Disk(path=path, serial="d1", readonly=True)


async def test_a_device_that_goes_after_the_time_is_up_leaves_nothing(
    vm: QemuVm, monitor: FakeMonitor, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DETACH_TIMEOUT", 0.01)
    monitor.slow = True
    await vm.attach_disk(disk)
    for _ in range(2):  # the second time, QEMU says that it has been asked already
        with pytest.raises(HypervisorError, match=r"did not let go of d1 within 0\.01 s"):
            await vm.detach_disk("d1")
    assert (len(monitor.devices), len(monitor.nodes), len(monitor.fdsets)) == (1, 1, 1)
    await monitor.let_go()
    await vm.detach_disk("d1")
    assert not monitor.nodes
    assert not monitor.fdsets
    await vm.detach_disk("d1")
    await vm.attach_disk(disk)


async def test_a_device_that_was_asked_for_already_is_waited_for(vm: QemuVm, monitor: FakeMonitor, disk: Disk) -> None:
    await vm.attach_disk(disk)
    monitor.slow = True
    first = asyncio.ensure_future(vm.detach_disk("d1"))
    while not monitor.unplugging:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    second = asyncio.ensure_future(vm.detach_disk("d1"))
    await asyncio.sleep(0.01)
    assert not second.done()
    await monitor.let_go()
    await second
    assert not monitor.nodes
    assert not monitor.fdsets


async def test_a_device_in_the_middle_of_its_end_is_waited_for(vm: QemuVm, monitor: FakeMonitor, disk: Disk) -> None:
    await vm.attach_disk(disk)
    monitor.devices.clear()
    monitor.ending = True
    detaching = asyncio.ensure_future(vm.detach_disk("d1"))
    await asyncio.sleep(0.01)
    assert not detaching.done()
    monitor.ending = False
    await monitor.let_go()
    await detaching
    assert not monitor.nodes
    assert not monitor.fdsets


async def test_a_disk_that_does_not_open_holds_up_nobody(
    vm: QemuVm, monitor: FakeMonitor, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is cancelled while open(2) blocks; the descriptor that it gets in the end is closed."""
    really_open, began, go_on, opened = os.open, threading.Event(), threading.Event(), []

    def dead(path: Path, flags: int) -> int:
        if path != disk.path:
            return really_open(path, flags)
        began.set()
        assert go_on.wait(20)
        opened.append(really_open(path, flags))
        return opened[0]

    monkeypatch.setattr(os, "open", dead)
    attaching = asyncio.ensure_future(vm.attach_disk(disk))
    await asyncio.to_thread(began.wait, 20)
    attaching.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await attaching
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
    assert not monitor.fdsets


async def test_a_virtio_disk_has_a_port_and_a_backing_and_gives_both_back(
    monitor: FakeMonitor, tmp_path: Path, disk: Disk
) -> None:
    identity = ProcessIdentity(pid=1, start_time=1)
    handle = VmHandle(
        id="v", driver="qemu", process=identity, helpers=[], directory=str(tmp_path), cid=0, vsock="", uuid="u"
    )
    vm = QemuVm(handle, DetachedProcess(identity), [], cast(Monitor, monitor))
    overlay = msgspec.structs.replace(
        disk, driver=DiskDriver.VIRTIO, format="qcow2", backing=Backing(path=disk.path, format="raw")
    )
    for _ in range(2 * PORTS):
        await vm.attach_disk(overlay)
        (device,) = monitor.devices
        assert re.fullmatch(r"at[0-7]-dev-d-d1", device)
        assert sorted(monitor.fdsets.values()) == ["backing of d1", "d1"]
        assert await vm.attached_disks() == {"d1"}
        await vm.detach_disk("d1")
        assert not monitor.devices
        assert not monitor.nodes
        assert not monitor.fdsets
