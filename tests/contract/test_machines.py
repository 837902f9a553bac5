"""What every hypervisor driver does with machines that boot from their disk.

A further driver is one more parameter of IMPLEMENTATIONS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from tests.contract.test_hypervisor import Processes
from tests.support import leaks
from tests.support.hosts import (
    embedded,
    footprint,
    libvirt_hypervisor,
    open_tap,
    qemu_hypervisor,
    short_directory,
)
from tests.support.machines import (
    ADDRESSES,
    DISKS,
    HELLO,
    MEMORY,
    OEM_STRINGS,
    PROCESSORS,
    SECTOR_UP,
    SMALL_UP,
    UEFI_NIC,
    UEFI_UP,
    SectorGuest,
    SmallGuest,
    UefiGuest,
    make_sector,
    shell,
    type_at,
    uefi_shell,
)
from tests.support.vm_images import small
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.errors import InvalidArgument
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.hypervisor.fake_machine import Guest
from vmruntime.hypervisor.firmware import find_ovmf
from vmruntime.hypervisor.interface import (
    Backing,
    Disk,
    FirmwareBoot,
    Hypervisor,
    Nic,
    VirtualMachine,
    VmEnd,
    VmSpec,
)
from vmruntime.model.image_pod import DiskDriver, Firmware
from vmruntime.model.resources import VmSize
from vmruntime.volumes.virtiofsd import find_virtiofsd, is_rust, virtiofsd_argv

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE = 60.0
QUIET = 0.3
"""Nothing is said for so long by a guest that is held."""

APART = 2.2
"""Resets that are closer together than two seconds are one reboot."""


class World:
    """A driver, the host it works on, and what its machines boot.

    Attributes:
        hypervisor: The driver.
        sector, image: Disks to boot from: the guest that is a sector, and a qcow2 image with a shell.
        variables: The template of UEFI's.
        by_signal: What is said of a machine whose QEMU was ended by a signal.
        real: Machines are real ones.
    """

    def __init__(
        self,
        base: Path,
        drivers: Callable[[], Hypervisor],
        sector: Path,
        image: Path,
        tap: Callable[[], int],
        variables: Path,
    ) -> None:
        self.hypervisor = drivers()
        self.sector, self.image, self.tap = sector, image, tap
        self.variables = variables
        self.real = True
        self.by_signal = VmEnd.KILLED
        self.guest_share: Callable[[Path], None] = lambda root: None
        self._base, self._drivers, self._number = base, drivers, 0

    def restarted(self) -> Hypervisor:
        """Return a driver object of the next daemon."""
        return self._drivers()

    def file(self, name: str, size: int = 1 << 20) -> Path:
        path = self._base / name
        path.write_bytes(b"\0" * size)
        return path

    def overlay(self, name: str, size: str) -> Path:
        path = self._base / f"{name}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, size], check=True)
        return path

    def spec(self, *disks: Disk, memory_mib: int = 32, **boot: Any) -> VmSpec:
        """Return a new machine; `boot` are more members of its FirmwareBoot."""
        self._number += 1
        directory = self._base / f"vm{self._number}"
        directory.mkdir()
        directory.chmod(0o711)
        return VmSpec(
            id=f"{self._number:064x}",
            size=VmSize(vcpus=1, memory_mib=memory_mib, max_vcpus=2, max_memory_mib=memory_mib + 512),
            boot=FirmwareBoot(name=f"test-{self._number}", uuid=str(uuid.uuid4()), **boot),
            directory=directory,
            cid=0,
            disks=list(disks),
        )

    def root_disk(self, name: str, size: str) -> Disk:
        """Return a disk on the image with the shell."""
        backing = Backing(path=self.image, format="qcow2")
        return Disk(path=self.overlay(name, size), serial="root", readonly=False, format="qcow2", backing=backing)

    def sector_disk(self) -> Disk:
        return Disk(path=self.sector, serial="sector", readonly=True, driver=DiskDriver.SCSI)

    async def held(self, processes: Processes | None = None) -> VirtualMachine:
        """Start a machine of one sector, which does not run yet."""
        return await self.hypervisor.start(self.spec(self.sector_disk()), (processes or Processes()).record)

    @contextlib.asynccontextmanager
    async def running(self, processes: Processes | None = None) -> AsyncIterator[VirtualMachine]:
        """Run a machine of one sector; at the end it is killed."""
        vm = await self.held(processes)
        try:
            await vm.resume()
            async with asyncio.timeout(PATIENCE):
                await vm.wait_for_console(SECTOR_UP)
            yield vm
        finally:
            await vm.kill()


def directory_of(vm: VirtualMachine) -> Path:
    return Path(vm.handle.directory)


def console_of(vm: VirtualMachine) -> bytes:
    return (directory_of(vm) / "console.log").read_bytes()


async def ended(vm: VirtualMachine) -> tuple[VmEnd, str]:
    async with asyncio.timeout(PATIENCE):
        reason = await vm.wait()
    return vm.end, reason


@contextlib.asynccontextmanager
async def fake(base: Path) -> AsyncIterator[World]:
    for name in ("sector.img", "small.qcow2"):
        (base / name).write_bytes(b"")
    small_guest = SmallGuest()

    def guest(spec: VmSpec) -> Guest:
        if isinstance(spec.boot, FirmwareBoot) and spec.boot.firmware is Firmware.UEFI:
            return UefiGuest()
        return SectorGuest() if spec.disks[0].serial == "sector" else small_guest

    hypervisor = FakeHypervisor(guest)
    null = lambda: os.open("/dev/null", os.O_RDWR)  # noqa: E731
    world = World(base, lambda: hypervisor, base / "sector.img", base / "small.qcow2", null, base / "sector.img")
    world.real = False
    world.guest_share = lambda root: setattr(small_guest, "share", root)
    yield world
    await hypervisor.close()


@contextlib.asynccontextmanager
async def qemu(base: Path) -> AsyncIterator[World]:
    if os.uname().machine != "x86_64":
        pytest.skip("the guest that is a sector is for x86")
    sector = base / "sector.img"
    make_sector(sector)
    with leaks.nothing_left(footprint(base)):
        yield World(base, qemu_hypervisor, sector, small(), open_tap, find_ovmf()[1])


@contextlib.asynccontextmanager
async def libvirt(base: Path) -> AsyncIterator[World]:
    sector = base / "sector.img"
    make_sector(sector)
    with leaks.nothing_left(footprint(base)):
        async with libvirt_hypervisor(base, embedded()) as hypervisor:
            world = World(base, lambda: hypervisor, sector, small(), open_tap, find_ovmf()[1])
            world.by_signal = VmEnd.LOST  # libvirt does not tell a signal from a failure
            yield world


IMPLEMENTATIONS = [
    pytest.param(fake, id="fake"),
    pytest.param(qemu, id="qemu", marks=pytest.mark.vm),
    pytest.param(libvirt, id="libvirt", marks=pytest.mark.vm),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=IMPLEMENTATIONS)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A world for the module."""
    with short_directory() as directory:
        async with request.param(directory) as world:
            yield world


@contextlib.asynccontextmanager
async def shared(root: Path, directory: Path) -> AsyncIterator[tuple[int, ProcessIdentity]]:
    """Run a virtiofsd that shows a directory; yield a connection to it and its identity."""
    program = find_virtiofsd("")
    path = directory / "share.sock"

    async def record(identity: ProcessIdentity) -> None:
        pass

    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client,
    ):
        server.bind(str(path))
        server.listen(1)
        argv = virtiofsd_argv(program, rust=await is_rust(program), root=root, fd=server.fileno())
        process = await DetachedProcess.spawn(
            argv, record=record, log=directory / "share.log", pass_fds=[server.fileno()]
        )
        client.connect(str(path))
        try:
            yield client.fileno(), process.identity
        finally:
            await process.end()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small_vm(world: World) -> AsyncIterator[VirtualMachine]:
    """A machine with a shell, for tests that leave it as it was; NIC and share were plugged in before it ran."""
    disks = [
        world.root_disk("root", "1G"),
        Disk(path=world.file("large"), serial="cut", readonly=False, size=1 << 19, driver=DiskDriver.VIRTIO),
        Disk(path=world.file("seed.iso"), serial="seed", readonly=True, cdrom=True),
    ]
    spec = world.spec(*disks, memory_mib=256, vnc=True, oem_strings=["vmruntime.test=a,b"])
    root = spec.directory / "shared"
    root.mkdir()
    (root / "hello").write_text("hello from the host")
    world.guest_share(root)
    vm = await world.hypervisor.start(spec, Processes().record)
    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(vm.kill)
        assert not await vm.has_share()
        connection, helper = await undo.enter_async_context(shared(root, spec.directory))
        await vm.attach_share("share", connection, helper)
        tap = world.tap()
        await vm.attach_nic(Nic(id="eth0", mac="02:00:00:00:00:01"), tap)
        os.close(tap)
        await vm.resume()
        async with asyncio.timeout(PATIENCE):
            await vm.wait_for_console(SMALL_UP)
        yield vm


async def test_it_is_held_until_it_is_let_run(world: World) -> None:
    processes = Processes()
    vm = await world.held(processes)
    assert processes.recorded["qemu"] == vm.handle.process
    assert vm.handle.uuid
    assert (vm.handle.cid, vm.handle.vsock) == (0, "")
    await asyncio.sleep(QUIET)
    assert console_of(vm) == b""
    await vm.resume()
    async with asyncio.timeout(PATIENCE):
        await vm.wait_for_console(SECTOR_UP)
    await vm.resume()  # again: success
    assert SECTOR_UP in vm.console_tail()
    assert SECTOR_UP.encode() in console_of(vm)
    await vm.kill()
    await vm.kill()  # again: success
    assert processes.running() == []
    assert (await ended(vm))[0] is VmEnd.KILLED
    with pytest.raises(VmGone):
        await world.hypervisor.adopt(vm.handle)


async def test_a_paused_guest_says_nothing(world: World) -> None:
    async with world.running() as vm:
        await vm.pause()
        await vm.pause()  # again: success
        typing = asyncio.ensure_future(type_at(directory_of(vm), "x"))
        await asyncio.sleep(QUIET)
        assert not typing.done()
        await vm.resume()
        assert b"x" in await typing


async def test_a_reboot_is_in_place(world: World) -> None:
    async with world.running() as vm:
        ending = asyncio.ensure_future(vm.wait())
        assert vm.reboots == 0
        await _reboots(vm, type_at(directory_of(vm), "r"))
        assert vm.reboots == 1
        await asyncio.sleep(APART)
        await _reboots(vm, vm.reset())
        assert vm.reboots == 2
        assert not ending.done()
        ending.cancel()


async def _reboots(vm: VirtualMachine, act: object) -> None:
    before = console_of(vm).count(SECTOR_UP.encode())
    assert asyncio.iscoroutine(act)
    await act
    async with asyncio.timeout(PATIENCE):
        while console_of(vm).count(SECTOR_UP.encode()) == before:
            await asyncio.sleep(0.02)


async def test_a_power_button_is_heard_and_the_end_told_until_the_machine_is_killed(world: World) -> None:
    async with world.running() as vm:
        ending = asyncio.ensure_future(ended(vm))
        await vm.press_power_button()
        assert await ending == (VmEnd.POWEROFF, "the guest powered off")
        await vm.close()
        second = await world.restarted().adopt(vm.handle)
        assert await ended(second) == (VmEnd.POWEROFF, "the guest powered off")
        await second.kill()
        assert second.end is VmEnd.POWEROFF
        with pytest.raises(VmGone):
            await world.restarted().adopt(vm.handle)


async def test_a_panic_is_told(world: World) -> None:
    async with world.running() as vm:
        ending = asyncio.ensure_future(ended(vm))
        await _let_end(vm, "c")
        end, reason = await ending
        assert end is VmEnd.CRASH
        assert "panicked" in reason


@pytest.mark.parametrize(("letter", "end"), [("p", VmEnd.POWEROFF), ("c", VmEnd.CRASH)], ids=["power-off", "panic"])
async def test_an_end_that_no_daemon_saw_is_told(world: World, letter: str, end: VmEnd) -> None:
    async with world.running() as vm:
        handle = msgspec.json.decode(msgspec.json.encode(vm.handle), type=type(vm.handle))
        await vm.close()
        await _let_end(vm, letter)
        await asyncio.sleep(QUIET)
        second = await world.restarted().adopt(handle)
        assert second.handle == handle
        try:
            assert (await ended(second))[0] is end
        finally:
            await second.kill()


async def _let_end(vm: VirtualMachine, letter: str) -> None:
    _, writer = await asyncio.open_unix_connection(directory_of(vm) / "console.sock")
    writer.write(letter.encode())
    await writer.drain()
    await asyncio.sleep(QUIET)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_it_goes_on_without_a_daemon(world: World) -> None:
    async with world.running() as vm:
        await vm.close()
        assert b"x" in await type_at(directory_of(vm), "x")
        second = await world.restarted().adopt(vm.handle)
        assert SECTOR_UP in second.console_tail()
        assert await second.attached_disks() == {"sector"}
        ending = asyncio.ensure_future(ended(second))
        await second.press_power_button()
        assert (await ending)[0] is VmEnd.POWEROFF
        await second.kill()


async def test_what_was_ended_on_the_host(world: World) -> None:
    async with world.running() as vm:
        ending = asyncio.ensure_future(ended(vm))
        os.kill(vm.handle.process.pid, signal.SIGKILL)
        assert (await ending)[0] is world.by_signal
    async with world.running() as vm:
        await vm.close()
        os.kill(vm.handle.process.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            await DetachedProcess(vm.handle.process).wait()
        with pytest.raises(VmGone):
            await world.restarted().adopt(vm.handle)


async def test_the_next_start_adds_to_the_console(world: World) -> None:
    spec = world.spec(world.sector_disk())
    for times in (1, 2):
        vm = await world.hypervisor.start(spec, Processes().record)
        await vm.resume()
        async with asyncio.timeout(PATIENCE):
            while console_of(vm).count(SECTOR_UP.encode()) < times:
                await asyncio.sleep(0.02)
        await vm.kill()


async def test_nics_until_the_ports_are_used_up(world: World) -> None:
    vm = await world.held()
    number, refused = 0, ""
    while not refused and number < 32:
        number += 1
        tap = world.tap()
        try:
            await vm.attach_nic(Nic(id=f"eth{number}", mac=f"02:00:00:00:00:{number:02x}"), tap)
        except HypervisorError as error:
            refused = error.message
        finally:
            os.close(tap)
    assert "no free port" in refused
    assert number > 7
    await vm.kill()


async def test_disks_that_cannot_be(world: World) -> None:
    missing = Disk(path=Path("/nonexistent.img"), serial="missing", readonly=True)
    below = msgspec.structs.replace(
        missing, path=world.overlay("lost", "1M"), format="qcow2", backing=Backing(path=missing.path, format="raw")
    )
    for disk in (missing, below):
        with pytest.raises(HypervisorError, match=r"/nonexistent\.img cannot be opened"):
            await world.hypervisor.start(world.spec(world.sector_disk(), disk), Processes().record)
    alike = [Disk(path=world.file(end), serial="x" * 20 + end, readonly=True, driver=DiskDriver.VIRTIO) for end in "ab"]
    with pytest.raises(InvalidArgument, match="looks like"):
        await world.hypervisor.start(world.spec(*alike), Processes().record)


async def test_uefi_and_a_tpm(world: World) -> None:
    """UEFI finds no system on the disk of one sector, and gives its own shell."""
    spec = world.spec(world.sector_disk(), memory_mib=128)
    variables = spec.directory / "variables.fd"
    shutil.copyfile(world.variables, variables)
    control = spec.directory / "tpm.sock"
    with listening_tpm(spec.directory, control):
        boot = msgspec.structs.replace(spec.boot, firmware=Firmware.UEFI, variables=variables, tpm=control)
        vm = await world.hypervisor.start(msgspec.structs.replace(spec, boot=boot), Processes().record)
        try:
            tap = world.tap()
            await vm.attach_nic(Nic(id="eth0", mac="02:00:00:00:00:03"), tap)
            os.close(tap)
            await vm.resume()
            async with asyncio.timeout(PATIENCE):
                await vm.wait_for_console(UEFI_UP)
            ending = asyncio.ensure_future(ended(vm))
            assert UEFI_NIC in await uefi_shell(spec.directory, "pci", "reset -s")
            assert (await ending)[0] is VmEnd.POWEROFF
            assert vm.reboots == 0
            if world.real:
                assert (spec.directory / "tpm2-00.permall").exists()  # the TPM has been started
        finally:
            await vm.kill()


@contextlib.contextmanager
def listening_tpm(directory: Path, control: Path) -> Iterator[None]:
    """Run a swtpm; it ends with its machine, at the latest here."""
    argv = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={directory}", "--ctrl", f"type=unixio,path={control}"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        while not control.is_socket():
            assert process.poll() is None
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


async def test_a_machine_that_never_was_is_forgotten(world: World) -> None:
    await world.hypervisor.forget(str(uuid.uuid4()))


async def test_the_guest_sees_what_it_was_started_with(small_vm: VirtualMachine) -> None:
    directory = directory_of(small_vm)
    assert await small_vm.attached_disks() == {"root", "cut", "seed"}
    seen = {tuple(line.split()) for line in (await shell(directory, DISKS)).splitlines()}
    assert {("size", str(1 << 21), "root"), ("size", "1024", "cut")} <= seen
    assert ("size", "2048") in {line[:2] for line in seen}  # CD-ROMs say their serial in no file
    assert (await shell(directory, ADDRESSES)).split() == ["02:00:00:00:00:01"]
    assert await small_vm.has_share()
    assert (await shell(directory, HELLO)).strip() == "hello from the host"
    assert "vmruntime.test=a,b" in await shell(directory, OEM_STRINGS)


async def test_devices_come_and_go_while_it_runs(world: World, small_vm: VirtualMachine) -> None:
    directory = directory_of(small_vm)
    for driver in DiskDriver:
        disk = Disk(path=world.file("hot", 3 << 19), serial=f"hot-{driver.value}", readonly=False, driver=driver)
        for _ in range(2):
            await small_vm.attach_disk(disk)
            assert await small_vm.attached_disks() == {"root", "cut", "seed", disk.serial}
            await _shows(directory, DISKS, f"size 3072 {disk.serial}")
            await small_vm.detach_disk(disk.serial)
            assert await small_vm.attached_disks() == {"root", "cut", "seed"}
    tap = world.tap()
    await small_vm.attach_nic(Nic(id="eth1", mac="02:00:00:00:00:02"), tap)
    os.close(tap)
    await _shows(directory, ADDRESSES, "02:00:00:00:00:02")


async def _shows(directory: Path, command: str, wanted: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while wanted not in await shell(directory, command):
            await asyncio.sleep(0.1)


async def test_its_agents_channel(small_vm: VirtualMachine) -> None:
    reader, writer = await asyncio.open_unix_connection(directory_of(small_vm) / "qga.sock")
    writer.write(b'{"execute": "guest-ping"}\n')
    async with asyncio.timeout(PATIENCE):
        assert msgspec.json.decode(await reader.readline()) == {"return": {}}
    writer.close()
    await writer.wait_closed()


async def test_its_sockets_are_roots_alone(small_vm: VirtualMachine) -> None:
    for name in ("console.sock", "qga.sock", "vnc.sock"):
        status = (directory_of(small_vm) / name).stat()
        assert (status.st_mode & 0o777, status.st_uid) == (0o600, 0)


async def test_its_screen(small_vm: VirtualMachine) -> None:
    reader, writer = await asyncio.open_unix_connection(directory_of(small_vm) / "vnc.sock")
    async with asyncio.timeout(PATIENCE):
        assert (await reader.readline()).startswith(b"RFB 003.")
    writer.close()
    await writer.wait_closed()


async def test_its_balloon_tells_of_its_memory(small_vm: VirtualMachine) -> None:
    stats: dict[str, int] = {}
    async with asyncio.timeout(PATIENCE):
        while not stats:
            stats = await small_vm.balloon_stats()
            await asyncio.sleep(0.1)
    assert 100 << 20 < stats["stat-total-memory"] <= 768 << 20
    assert all(value >= 0 for value in stats.values())


async def test_it_can_grow(small_vm: VirtualMachine) -> None:
    directory = directory_of(small_vm)
    await small_vm.resize(VmSize(vcpus=2, memory_mib=512))
    await _shows(directory, PROCESSORS, "2")
    async with asyncio.timeout(PATIENCE):
        while int((await shell(directory, MEMORY)).split()[1]) < 400_000:
            await asyncio.sleep(0.2)
    with pytest.raises(HypervisorError):
        await small_vm.resize(VmSize(vcpus=3, memory_mib=512))
