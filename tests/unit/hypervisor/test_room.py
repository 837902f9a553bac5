"""A guest that is held because the host's disk is full, against a monitor that remembers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from vmruntime.aio.tasks import TaskScope
from vmruntime.hypervisor import vsock
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.qmp import room as module
from vmruntime.hypervisor.qmp.monitor import Monitor
from vmruntime.hypervisor.qmp.room import RoomWatch

PATIENCE = 5.0
STOPPED = {"event": "BLOCK_IO_ERROR", "data": {"action": "stop", "operation": "write", "nospace": True}}
REPORTED = {"event": "BLOCK_IO_ERROR", "data": {"action": "report", "operation": "read", "nospace": False}}


class FakeVm:
    """A VM whose guest writes to a disk, and its monitor."""

    def __init__(self) -> None:
        self.full = False
        self.status = "running"
        self.failure: HypervisorError | None = None
        self.asked = self.resumed = self.went_on = 0
        self.told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def write(self) -> None:
        if self.full:
            self.status = "io-error"
            self.told.put_nowait(STOPPED)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        assert command == "query-status"
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return {"status": self.status}

    async def events(self, *names: str) -> AsyncIterator[dict[str, Any]]:
        while (event := await self.told.get()) is not None:
            yield event

    async def resume(self) -> None:
        self.resumed += 1
        if self.failure is not None:
            raise self.failure
        self.status = "running"
        self.write()

    async def note_resumed(self) -> None:
        self.went_on += 1


@pytest.mark.parametrize(("says", "of_use"), [(b"OK 1\n", True), (b"", True), (None, False)])
async def test_a_vsock_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: bytes | None, of_use: bool
) -> None:
    """It answers, if only by hanging up; one that locked up does neither."""
    monkeypatch.setattr(vsock, "ANSWER_TIMEOUT", 0.1)
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readline()).startswith(b"CONNECT ")
        if says is None:
            await over.wait()
        else:
            writer.write(says)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "vsock"):
        assert await vsock.vsock_answers(tmp_path / "vsock") is of_use
        over.set()
    assert not await vsock.vsock_answers(tmp_path / "none")


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def watch(vm: FakeVm, monkeypatch: pytest.MonkeyPatch) -> RoomWatch:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    return RoomWatch("vm", cast(Monitor, vm), vm.resume, vm.note_resumed)


@contextlib.asynccontextmanager
async def watching(watch: RoomWatch) -> AsyncIterator[asyncio.Task[None]]:
    scope = TaskScope("room")
    try:
        yield scope.start(watch.watch(), "watch")
    finally:
        await scope.close()


async def until(true: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.005)


async def test_a_guest_goes_on_when_there_is_room(vm: FakeVm, watch: RoomWatch) -> None:
    async with watching(watch):
        vm.full = True
        vm.write()
        await until(lambda: "no room" in watch.held and vm.resumed > 2)
        assert vm.status == "io-error"
        vm.full = False
        await until(lambda: watch.held == "")
        assert vm.status == "running"
        await until(lambda: vm.went_on == 1)
        vm.full = True  # and once more
        vm.write()
        await until(lambda: watch.held)


async def test_one_that_was_held_before_the_daemon_came(vm: FakeVm, watch: RoomWatch) -> None:
    vm.status = "io-error"
    async with watching(watch):
        await until(lambda: vm.status == "running")


@pytest.mark.parametrize("status", ["running", "paused", "prelaunch"])
async def test_nobody_else_is_resumed(vm: FakeVm, watch: RoomWatch, status: str) -> None:
    vm.status = status
    async with watching(watch):
        vm.told.put_nowait(REPORTED)
        vm.told.put_nowait(STOPPED)
        await until(lambda: vm.asked == 2)
        assert (vm.status, vm.resumed, watch.held) == (status, 0, "")
        assert vm.went_on == 0


async def test_a_monitor_that_is_busy_is_asked_again(vm: FakeVm, watch: RoomWatch) -> None:
    vm.full = True
    async with watching(watch):
        vm.write()
        await until(lambda: watch.held)
        vm.failure = HypervisorError("QEMU did not answer query-status within 20 s")
        asked = vm.asked
        await until(lambda: vm.asked > asked + 2)
        assert watch.held
        vm.failure, vm.full = None, False
        await until(lambda: not watch.held)


async def test_it_ends_with_its_vm(vm: FakeVm, watch: RoomWatch) -> None:
    async with watching(watch) as task:
        vm.failure = VmGone("QEMU went away")
        vm.told.put_nowait(STOPPED)
        await asyncio.wait_for(task, PATIENCE)
