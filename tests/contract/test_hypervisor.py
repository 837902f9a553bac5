"""What every hypervisor driver does. A further driver is one more parameter of IMPLEMENTATIONS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from tests.support import leaks
from tests.support.hosts import (
    GUEST,
    embedded,
    footprint,
    libvirt_hypervisor,
    open_tap,
    qemu_hypervisor,
    short_directory,
)
from vmruntime.agent.fake_guest import FakeGuest
from vmruntime.agent.fake_server import BootingGuest
from vmruntime.aio import memfile
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.errors import Internal
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.hypervisor.interface import (
    Disk,
    GuestMemory,
    Hypervisor,
    KernelBoot,
    Nic,
    PluggedNic,
    VirtualMachine,
    VmSpec,
)
from vmruntime.model.resources import VmSize

pytestmark = pytest.mark.asyncio(loop_scope="module")

READY = "vmruntime-agent: ready"
CONNECTED = "vmruntime-agent: connected"
PATIENCE = 60.0
ACCOUNT = "vmruntime"


class Processes:
    """What was recorded of one VM.

    Attributes:
        limit: Recording fails after so many.
    """

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self.recorded: dict[str, ProcessIdentity] = {}

    async def record(self, role: str, identity: ProcessIdentity) -> None:
        if len(self.recorded) == self.limit:
            raise Internal("the store is full")
        self.recorded[role] = identity

    def running(self) -> list[str]:
        """Return the roles of the processes that run."""
        return [role for role, identity in self.recorded.items() if DetachedProcess(identity).alive]


class Driver:
    """A driver and what a VM of it boots."""

    def __init__(
        self, hypervisor: Hypervisor, base: Path, kernel: Path, initramfs: Path, tap: Callable[[], int]
    ) -> None:
        self.hypervisor = hypervisor
        self.tap = tap
        self._base = base
        self._kernel = kernel
        self._initramfs = initramfs
        self._number = 0

    def disk(self, name: str, *, readonly: bool = False) -> Disk:
        path = self._base / f"{name}.img"
        path.write_bytes(b"\0" * (1 << 20))
        path.chmod(0o600)
        return Disk(path=path, serial=name, readonly=readonly)

    def spec(self, *disks: Disk) -> VmSpec:
        self._number += 1
        directory = self._base / f"vm{self._number}"
        directory.mkdir()
        directory.chmod(0o711)
        return VmSpec(
            id=f"{self._number:013x}".ljust(64, "0"),
            size=VmSize(vcpus=1, memory_mib=128),
            boot=KernelBoot(kernel=self._kernel, initramfs=self._initramfs),
            directory=directory,
            cid=7000 + self._number,
            disks=list(disks),
        )

    async def start(self, *disks: Disk, processes: Processes | None = None) -> VirtualMachine:
        """Start a VM with these disks."""
        processes = Processes() if processes is None else processes
        return await self.hypervisor.start(self.spec(*disks), processes.record)

    async def booted(self, *disks: Disk, processes: Processes | None = None) -> VirtualMachine:
        """Start a VM and wait until its guest is up."""
        vm = await self.start(*disks, processes=processes)
        async with asyncio.timeout(PATIENCE):
            await vm.wait_for_console(READY)
        return vm


@contextlib.asynccontextmanager
async def fake(base: Path) -> AsyncIterator[Driver]:
    for name in ("vmlinuz", "initramfs.img"):
        (base / name).write_bytes(b"")
    hypervisor = FakeHypervisor(lambda spec: BootingGuest(FakeGuest()))
    hypervisor.frozen_shape = "fake"
    yield Driver(hypervisor, base, base / "vmlinuz", base / "initramfs.img", lambda: os.open("/dev/null", os.O_RDWR))
    await hypervisor.close()


@contextlib.asynccontextmanager
async def qemu(base: Path) -> AsyncIterator[Driver]:
    with leaks.nothing_left(footprint(base)):
        yield Driver(qemu_hypervisor(), base, GUEST / "vmlinuz", GUEST / "initramfs.img", open_tap)


@contextlib.asynccontextmanager
async def libvirt(base: Path) -> AsyncIterator[Driver]:
    with leaks.nothing_left(footprint(base)):
        async with libvirt_hypervisor(base, embedded()) as hypervisor:
            yield Driver(hypervisor, base, GUEST / "vmlinuz", GUEST / "initramfs.img", open_tap)


IMPLEMENTATIONS = [
    pytest.param(fake, id="fake"),
    pytest.param(qemu, id="qemu", marks=pytest.mark.vm),
    pytest.param(libvirt, id="libvirt", marks=pytest.mark.vm),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=IMPLEMENTATIONS)
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    """A driver for the module."""
    with short_directory() as directory:
        async with request.param(directory) as driver:
            yield driver


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_vm(driver: Driver) -> AsyncIterator[VirtualMachine]:
    """A booted VM for tests that leave it as it was."""
    vm = await driver.booted(driver.disk("first"))
    yield vm
    await vm.kill()
    await vm.close()


async def test_a_vm_from_start_to_kill(driver: Driver) -> None:
    processes = Processes()
    spec = driver.spec(driver.disk("boot"))
    vm = await driver.hypervisor.start(spec, processes.record)
    assert processes.recorded["qemu"] == vm.handle.process
    assert vm.handle.helpers == [identity for role, identity in processes.recorded.items() if role != "qemu"]
    assert (vm.handle.id, vm.handle.cid, vm.handle.directory) == (spec.id, spec.cid, str(spec.directory))
    ending = asyncio.ensure_future(vm.wait())
    async with asyncio.timeout(PATIENCE):
        await vm.wait_for_console(READY)
    assert READY in vm.console_tail()
    assert await vm.attached_disks() == {"boot"}
    assert not ending.done()
    await vm.kill()
    async with asyncio.timeout(PATIENCE):
        assert (await ending).strip()
    assert processes.running() == []
    await vm.kill()  # again: success
    await vm.close()
    with pytest.raises(VmGone):
        await driver.hypervisor.adopt(vm.handle)


async def test_nothing_runs_that_was_not_recorded(driver: Driver) -> None:
    """Recording fails for each process in turn: it never runs, and the ones before it are ended."""
    for limit in range(10):
        processes = Processes(limit)
        try:
            vm = await driver.start(processes=processes)
        except Internal as error:
            assert error.message == "the store is full"
            assert processes.running() == []
        else:
            assert limit == len(processes.recorded) > 0
            await vm.kill()
            return
    raise AssertionError("a VM of more than ten processes")


async def test_a_disk_that_cannot_be_opened_stops_the_start(driver: Driver) -> None:
    processes = Processes()
    missing = Disk(path=Path("/nonexistent/disk.img"), serial="missing", readonly=True)
    with pytest.raises(HypervisorError, match=r"/nonexistent/disk\.img cannot be opened"):
        await driver.start(missing, processes=processes)
    assert processes.running() == []


def _memory(size_mib: int) -> int:
    return memfile.make("contract", size_mib << 20)


async def test_a_frozen_guest_goes_on_in_other_vms(driver: Driver) -> None:
    """Two guests of one: each has a CID, a disk, a tap and memory of its own, and is held until it is let go on."""
    bare = msgspec.structs.replace(driver.spec(driver.disk("frozen")), cid=0)
    if not await driver.hypervisor.shape(bare):
        pytest.skip("this driver freezes no guests")
    with contextlib.ExitStack() as descriptors:
        memory = _memory(bare.size.memory_mib)
        descriptors.callback(os.close, memory)

        def nic() -> PluggedNic:
            tap = driver.tap()
            descriptors.callback(os.close, tap)
            return PluggedNic(nic=Nic(id="first", mac="02:00:00:00:00:07"), tap_fd=tap)

        source = await driver.hypervisor.start(
            msgspec.structs.replace(bare, memory=GuestMemory(fd=memory), nic=nic()), Processes().record
        )
        async with asyncio.timeout(PATIENCE):
            await source.wait_for_console(READY)
            state = await source.freeze()
        await source.kill()
        vms = []
        for number in range(2):
            processes = Processes()
            own = _memory(bare.size.memory_mib)
            descriptors.callback(os.close, own)
            memfile.copy(memory, own)
            spec = driver.spec(msgspec.structs.replace(driver.disk(f"own{number}"), serial="frozen"))
            spec = msgspec.structs.replace(spec, memory=GuestMemory(fd=own), frozen=True, nic=nic())
            vm = await driver.hypervisor.start(spec, processes.record)
            assert vm.handle.helpers == [one for role, one in processes.recorded.items() if role != "qemu"]
            await vm.thaw(state)
            assert await vm.attached_disks() == {"frozen"}
            assert vm.console_tail() == ""
            await vm.attach_nic(Nic(id="second", mac="02:00:00:00:00:08"), nic().tap_fd)
            vms.append((vm, processes))
        for vm, _ in vms:
            await vm.resume()
        for vm, processes in vms:
            async with asyncio.timeout(PATIENCE):
                await vm.wait_for_console(CONNECTED)
            await vm.kill()
            assert processes.running() == []


async def test_guests_share_frozen_memory_until_they_write(driver: Driver) -> None:
    bare = msgspec.structs.replace(driver.spec(), cid=0)
    if not await driver.hypervisor.shape(bare):
        pytest.skip("this driver freezes no guests")
    with contextlib.ExitStack() as descriptors:
        memory = _memory(bare.size.memory_mib)
        descriptors.callback(os.close, memory)
        given = GuestMemory(fd=memory)
        source = await driver.hypervisor.start(msgspec.structs.replace(bare, memory=given), Processes().record)
        async with asyncio.timeout(PATIENCE):
            await source.wait_for_console(READY)
            state = await source.freeze()
        await source.kill()
        memfile.seal(memory)
        shared = msgspec.structs.replace(given, private=True)
        for number in range(2):
            spec = msgspec.structs.replace(driver.spec(), cid=0, memory=shared, frozen=True)
            vm = await driver.hypervisor.start(spec, Processes().record)
            await vm.thaw(state)
            await vm.resume()
            await vm.attach_disk(driver.disk(f"cow{number}"))
            await vm.pause()
            await vm.kill()


async def test_what_is_no_frozen_guest_is_refused(driver: Driver) -> None:
    spec = driver.spec()
    if not await driver.hypervisor.shape(spec):
        pytest.skip("this driver freezes no guests")
    with contextlib.ExitStack() as descriptors:
        memory = _memory(spec.size.memory_mib)
        descriptors.callback(os.close, memory)
        spec = msgspec.structs.replace(spec, memory=GuestMemory(fd=memory), frozen=True)
        processes = Processes()
        vm = await driver.hypervisor.start(spec, processes.record)
        with pytest.raises(HypervisorError):
            await vm.thaw(b"\x51\x45\x56\x4d garbage" * 100)
        await vm.kill()
        assert processes.running() == []
        booted = await driver.start()
        with pytest.raises(HypervisorError):
            await booted.thaw(b"")
        await booted.kill()


async def test_a_shape_changes_with_what_a_guest_depends_on(driver: Driver) -> None:
    spec = driver.spec()
    shape = await driver.hypervisor.shape(spec)
    if not shape:
        pytest.skip("this driver freezes no guests")
    other = msgspec.structs.replace(driver.spec(), cid=99)
    assert await driver.hypervisor.shape(other) == shape
    larger = msgspec.structs.replace(spec, size=VmSize(vcpus=1, memory_mib=256))
    assert await driver.hypervisor.shape(larger) != shape


async def test_a_cancelled_start_leaves_nothing(driver: Driver) -> None:
    for moment in (0.0, 0.01, 0.05):
        processes = Processes()
        starting = asyncio.ensure_future(driver.start(processes=processes))
        await asyncio.sleep(moment)
        starting.cancel()
        try:
            vm = await starting
        except asyncio.CancelledError:
            pass
        else:
            await vm.kill()
        assert processes.running() == []


async def test_disks_come_and_go(driver: Driver, shared_vm: VirtualMachine) -> None:
    layer = driver.disk("a" * 32, readonly=True)
    await shared_vm.attach_disk(layer)
    assert await shared_vm.attached_disks() == {"first", layer.serial}
    with pytest.raises(HypervisorError):
        await shared_vm.attach_disk(layer)
    assert await shared_vm.attached_disks() == {"first", layer.serial}
    await shared_vm.detach_disk(layer.serial)
    await shared_vm.detach_disk(layer.serial)
    await shared_vm.detach_disk("never-there")
    assert await shared_vm.attached_disks() == {"first"}
    await shared_vm.attach_disk(layer)
    await shared_vm.detach_disk(layer.serial)


async def test_a_disk_that_was_given_up_on_can_come_again(driver: Driver, shared_vm: VirtualMachine) -> None:
    """The call that asks for it back is cancelled at some point; the next one takes away what is left."""
    layer = driver.disk("b" * 32, readonly=True)
    for turns in range(4):
        await shared_vm.attach_disk(layer)
        first = asyncio.ensure_future(shared_vm.detach_disk(layer.serial))
        for _ in range(turns):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        await shared_vm.detach_disk(layer.serial)
        assert await shared_vm.attached_disks() == {"first"}


async def test_a_disk_that_is_refused_is_not_attached(driver: Driver, shared_vm: VirtualMachine) -> None:
    for path in (Path("/nonexistent.img"), Path("/tmp")):
        with pytest.raises(HypervisorError):
            await shared_vm.attach_disk(Disk(path=path, serial="bad", readonly=False))
        assert await shared_vm.attached_disks() == {"first"}
    good = msgspec.structs.replace(driver.disk("good"), serial="bad")
    await shared_vm.attach_disk(good)
    await shared_vm.detach_disk("bad")


async def test_many_disks_at_once(driver: Driver, shared_vm: VirtualMachine) -> None:
    disks = [driver.disk(f"{number:032x}", readonly=True) for number in range(12)]
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for disk in disks:
            group.create_task(shared_vm.attach_disk(disk))
    assert await shared_vm.attached_disks() == {"first", *(disk.serial for disk in disks)}
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for disk in disks:
            group.create_task(shared_vm.detach_disk(disk.serial))
    assert await shared_vm.attached_disks() == {"first"}


async def test_the_console_is_searched_from_the_start(driver: Driver) -> None:
    """Who begins to wait when the line has been written must not wait for ever."""
    vm = await driver.start()
    async with asyncio.timeout(PATIENCE):
        while READY not in vm.console_tail():
            await asyncio.sleep(0.02)
        await vm.wait_for_console(READY)
    await vm.kill()


async def test_nics_until_the_ports_are_used_up(driver: Driver) -> None:
    vm = await driver.booted()
    taps: list[int] = []
    with pytest.raises(HypervisorError):
        await vm.attach_nic(Nic(id="eth9", mac="02:00:00:00:00:99"), 9999)  # no such descriptor
    refused = ""
    while not refused and len(taps) < 16:
        taps.append(driver.tap())
        try:
            await vm.attach_nic(Nic(id=f"eth{len(taps)}", mac=f"02:00:00:00:00:{len(taps):02x}"), taps[-1])
        except HypervisorError as error:
            refused = error.message
    assert "no free port" in refused
    assert len(taps) > 1
    for tap in taps:
        os.close(tap)  # still ours
    await vm.kill()


async def test_a_vm_is_adopted_with_what_is_plugged_in(driver: Driver) -> None:
    processes = Processes()
    first = await driver.booted(driver.disk("kept"), processes=processes)
    await first.attach_disk(driver.disk("hot", readonly=True))
    handle = msgspec.json.decode(msgspec.json.encode(first.handle), type=type(first.handle))
    await first.close()
    assert processes.running() == list(processes.recorded)
    second = await driver.hypervisor.adopt(handle)
    assert second.handle == first.handle
    assert await second.attached_disks() == {"kept", "hot"}
    await second.detach_disk("hot")
    assert not await second.has_share()
    ending = asyncio.ensure_future(second.wait())
    await asyncio.sleep(0.05)
    assert not ending.done()
    os.kill(handle.process.pid, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE):
        assert "QEMU ended" in await ending
    with pytest.raises(VmGone):
        await driver.hypervisor.adopt(handle)
    with pytest.raises(VmGone):
        await second.attached_disks()
    await second.kill()
    assert processes.running() == []


async def test_another_process_is_never_taken_for_a_vm(driver: Driver, shared_vm: VirtualMachine) -> None:
    impostor = ProcessIdentity(pid=os.getpid(), start_time=1)
    with pytest.raises(VmGone):
        await driver.hypervisor.adopt(msgspec.structs.replace(shared_vm.handle, process=impostor))


async def test_a_dead_vm_takes_nothing_more(driver: Driver) -> None:
    processes = Processes()
    vm = await driver.start(processes=processes)
    os.kill(vm.handle.process.pid, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE):
        await vm.wait()
    for call in (
        vm.attach_disk(driver.disk("late")),
        vm.attached_disks(),
        vm.attach_nic(Nic(id="eth0", mac="02:00:00:00:00:01"), 0),
        vm.has_share(),
    ):
        with pytest.raises(VmGone):
            await call
    await vm.kill()
    assert processes.running() == []
