"""VMs outlive libvirt: its daemon, and the process that it is inside of."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.hosts import GUEST, libvirt_hypervisor, short_directory
from tests.support.libvirtd import Libvirtd, libvirtd
from tests.support.machines import SECTOR_UP, make_sector
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.interface import Disk, FirmwareBoot, KernelBoot, VirtualMachine, VmEnd, VmHandle, VmSpec
from vmruntime.hypervisor.libvirt import connection
from vmruntime.hypervisor.libvirt.driver import LibvirtHypervisor, probe
from vmruntime.hypervisor.libvirt.place import embedded_uri
from vmruntime.model.resources import VmSize

pytestmark = pytest.mark.vm

PATIENCE = 60.0
READY = "vmruntime-agent: ready"
# The life of an earlier daemon: it starts a VM, says what it would have stored, and dies with no word to libvirt.
EARLIER_DAEMON = """
import asyncio, os, sys
from pathlib import Path
import msgspec
from tests.support.hosts import libvirt_hypervisor
from tests.vm.test_libvirt import spec

async def main():
    base = Path(sys.argv[1])
    async with libvirt_hypervisor(base, sys.argv[2]) as hypervisor:
        async def record(role, identity):
            pass
        vm = await hypervisor.start(spec(base), record)
        print(msgspec.json.encode(vm.handle).decode(), flush=True)
        os._exit(0)

asyncio.run(main())
"""


@pytest.fixture
def base() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def daemon() -> Iterator[Libvirtd]:
    with short_directory() as directory, libvirtd(directory / "libvirtd") as daemon:
        yield daemon


@pytest.fixture
async def hypervisor(base: Path, daemon: Libvirtd) -> AsyncIterator[LibvirtHypervisor]:
    async with libvirt_hypervisor(base, daemon.uri) as hypervisor:
        yield hypervisor
        if not daemon.runs:
            daemon.start()
            await hypervisor.sweep([])  # libvirt itself finds out in a moment what ended meanwhile


def spec(base: Path) -> VmSpec:
    directory = base / "vm"
    directory.mkdir()
    directory.chmod(0o711)
    return VmSpec(
        id="5".ljust(64, "0"),
        size=VmSize(vcpus=1, memory_mib=128),
        boot=KernelBoot(kernel=GUEST / "vmlinuz", initramfs=GUEST / "initramfs.img"),
        directory=directory,
        cid=7300,
    )


def disk(base: Path, name: str) -> Disk:
    path = base / f"{name}.img"
    path.write_bytes(b"\0" * (1 << 20))
    return Disk(path=path, serial=name, readonly=False)


async def record(role: str, identity: ProcessIdentity) -> None:
    """Write nothing down."""


async def ended(vm: VirtualMachine) -> VmEnd:
    async with asyncio.timeout(PATIENCE):
        await vm.wait()
    return vm.end


async def test_a_vm_outlives_libvirtd(base: Path, daemon: Libvirtd, hypervisor: LibvirtHypervisor) -> None:
    vm = await hypervisor.start(spec(base), record)
    async with asyncio.timeout(PATIENCE):
        await vm.wait_for_console(READY)
    waiting = asyncio.ensure_future(vm.wait())
    daemon.kill()
    attaching = asyncio.ensure_future(vm.attach_disk(disk(base, "meanwhile")))
    await asyncio.sleep(0.5)
    assert not attaching.done()
    await asyncio.to_thread(daemon.start)
    async with asyncio.timeout(PATIENCE):
        await attaching
    assert await vm.attached_disks() == {"meanwhile"}
    assert not waiting.done()
    await vm.pause()
    await vm.resume()
    await vm.kill()
    await waiting
    assert vm.end is VmEnd.KILLED


async def test_commands_do_not_wait_for_ever(
    base: Path, daemon: Libvirtd, hypervisor: LibvirtHypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.5)
    vm = await hypervisor.start(spec(base), record)
    daemon.kill()
    with pytest.raises(HypervisorError, match="does not answer, so there is no query-fdsets"):
        await vm.attached_disks()
    with pytest.raises(HypervisorError, match="does not answer"):
        await probe(daemon.uri)
    await vm.kill()  # without libvirt
    assert not DetachedProcess(vm.handle.process).alive
    assert await ended(vm) is VmEnd.KILLED


async def test_a_vm_that_ended_while_libvirtd_was_away(
    base: Path, daemon: Libvirtd, hypervisor: LibvirtHypervisor
) -> None:
    vm = await hypervisor.start(spec(base), record)
    waiting = asyncio.ensure_future(vm.wait())
    daemon.kill()
    os.kill(vm.handle.process.pid, signal.SIGKILL)
    await asyncio.sleep(0.2)
    await asyncio.to_thread(daemon.start)
    async with asyncio.timeout(PATIENCE):
        assert "QEMU ended" in await waiting
    assert vm.end is VmEnd.LOST
    with pytest.raises(VmGone):
        await hypervisor.adopt(vm.handle)
    await vm.kill()


@pytest.mark.parametrize(("letter", "end"), [("p", VmEnd.POWEROFF), ("c", VmEnd.CRASH)], ids=["power-off", "panic"])
async def test_a_machine_whose_guest_ended_while_libvirtd_was_away(
    base: Path, daemon: Libvirtd, hypervisor: LibvirtHypervisor, letter: str, end: VmEnd
) -> None:
    make_sector(base / "sector.img")
    sector = Disk(path=base / "sector.img", serial="sector", readonly=True)
    boot = FirmwareBoot(name="away", uuid=str(uuid.uuid4()))
    vm = await hypervisor.start(msgspec.structs.replace(spec(base), boot=boot, cid=0, disks=[sector]), record)
    await vm.resume()
    async with asyncio.timeout(PATIENCE):
        await vm.wait_for_console(SECTOR_UP)
    ending = asyncio.ensure_future(ended(vm))
    daemon.kill()
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(str(base / "vm" / "console.sock"))
        console.sendall(letter.encode())
        await asyncio.sleep(0.5)
    await asyncio.to_thread(daemon.start)
    assert await ending is end
    await vm.close()
    second = await hypervisor.adopt(vm.handle)
    assert await ended(second) is end
    await second.kill()
    with pytest.raises(VmGone):
        await hypervisor.adopt(vm.handle)
    await hypervisor.forget(boot.uuid)


async def test_somebody_elses_machine_is_left_alone(
    base: Path, daemon: Libvirtd, hypervisor: LibvirtHypervisor
) -> None:
    vm = await hypervisor.start(spec(base), record)
    other = base / "other"
    other.mkdir()
    async with libvirt_hypervisor(other, daemon.uri) as neighbour:
        assert await neighbour.sweep([]) == []
        with pytest.raises(HypervisorError, match="somebody else's"):
            await neighbour.start(msgspec.structs.replace(spec(other), cid=7301), record)
    assert DetachedProcess(vm.handle.process).alive
    assert await hypervisor.sweep([vm.handle.id]) == []
    assert await hypervisor.sweep([]) == [vm.handle.id]
    assert await ended(vm) is VmEnd.KILLED
    await vm.kill()


async def test_libvirts_version_is_told(daemon: Libvirtd) -> None:
    assert f"at {daemon.uri}, QEMU " in await probe(daemon.uri)


async def test_a_vm_outlives_the_process_that_libvirt_is_inside_of(base: Path) -> None:
    uri = embedded_uri(base / "libvirt")
    handles = [await asyncio.to_thread(live_earlier, base, uri)]
    handle = msgspec.json.decode(handles[0], type=VmHandle)
    process = DetachedProcess(handle.process)
    assert process.alive
    answer = await asyncio.to_thread(live_later, base, uri, handles[0])
    assert answer.split() == ["{'late'}", "KILLED", "None"]
    assert not process.alive


def live_earlier(base: Path, uri: str) -> str:
    return run(EARLIER_DAEMON, str(base), uri)


# A process of its own, too: libvirt inside this one may have been somewhere else.
LATER_DAEMON = """
import asyncio, sys
from pathlib import Path
import msgspec
from tests.support.hosts import libvirt_hypervisor
from tests.vm.test_libvirt import READY, disk
from vmruntime.hypervisor.interface import VmHandle
from vmruntime.hypervisor.errors import VmGone

async def main():
    base = Path(sys.argv[1])
    async with libvirt_hypervisor(base, sys.argv[2]) as hypervisor:
        handle = msgspec.json.decode(sys.argv[3], type=VmHandle)
        vm = await hypervisor.adopt(handle)
        async with asyncio.timeout(60):
            await vm.wait_for_console(READY)
        await vm.attach_disk(disk(base, "late"))
        print(await vm.attached_disks())
        waiting = asyncio.ensure_future(vm.wait())
        await vm.kill()
        await waiting
        print(vm.end.name)
        try:
            print(await hypervisor.adopt(handle))
        except VmGone:
            print(None)

asyncio.run(main())
"""


def live_later(base: Path, uri: str, handle: str) -> str:
    return run(LATER_DAEMON, str(base), uri, handle)


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
