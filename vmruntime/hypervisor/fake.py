"""A hypervisor in memory: its VMs have devices, a console, a vsock and an end, and whatever guest is put into them.

Two small processes stand for a VM's QEMU and vsock helper, so that what the daemon writes down (pids), kills and
finds again is real; they end with the process that made them. Connections to the guest go through a hybrid socket with
the same handshake as vhost-device-vsock's. Faults are ordered by "vm." and the method's name, by "vm.process ROLE" for a
process about to run, and by "vm.boot" for the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.faults import Faults
from vmruntime.aio.tasks import TaskScope
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.interface import (
    Accelerator,
    Disk,
    Nic,
    Recorder,
    VmHandle,
    VmSpec,
    VsockTransport,
)
from vmruntime.model.resources import VmSize

MOST_NICS = 4
CONSOLE_LINES = 12
COPY_BYTES = 65536


class Guest(Protocol):
    """What runs in a VM."""

    async def boot(self, machine: FakeMachine) -> None:
        """Come up: say so on the console, listen on ports."""

    async def die(self) -> None:
        """End at once: the power is gone."""


class FakeMachine:
    """One VM, as the world has it: it outlives the daemon's FakeVm objects.

    Attributes:
        disks, nics: What is plugged in, by serial and by id.
        size: What it has grown to.
        console: Every line the guest said.
        ports: The unix socket behind each vsock port the guest listens on.
        process: Stands for QEMU; killing it ends the VM.
    """

    def __init__(self, spec: VmSpec, faults: Faults) -> None:
        self.spec = spec
        self.directory = spec.directory
        self.faults = faults
        self.disks: dict[str, Disk] = {disk.serial: disk for disk in spec.disks}
        self.nics: dict[str, Nic] = {}
        self.shares: list[str] = []
        self.size = spec.size
        self.console: list[str] = []
        self.ports: dict[int, Path] = {}
        self.process: DetachedProcess
        self.handle: VmHandle
        self.reason = ""
        self._power: int | None = None
        self._said = asyncio.Event()
        self._ended = asyncio.Event()
        self._scope = TaskScope(f"fake vm {spec.id[:13]}")
        self._accepting: asyncio.Task[None]

    def say(self, line: str) -> None:
        """Write a line on the console."""
        self.console.append(line)
        self._said.set()
        self._said = asyncio.Event()

    def power_off(self, reason: str = "the guest powered off") -> None:
        """End the VM from inside."""
        if self._power is not None:
            self.reason = self.reason or reason
            os.close(self._power)
            self._power = None

    async def crash(self) -> None:
        """Kill the process that stands for QEMU."""
        await self.process.end()
        await self._ended.wait()

    async def wait_for_line(self, text: str) -> None:
        """Wait until the console has a line with this text."""
        while not any(text in line for line in self.console):
            await self._said.wait()

    async def wait(self) -> str:
        """Wait for the end."""
        await self._ended.wait()
        return self.reason

    @property
    def ended(self) -> bool:
        """Whether it does not run any more."""
        return self._ended.is_set()

    async def launch(self, guest: Guest, record: Recorder) -> None:
        """Start the processes, then the guest; what was started ends when something fails."""
        async with contextlib.AsyncExitStack() as undo:
            reader, self._power = os.pipe()
            undo.callback(self.power_off)
            try:
                helper = await self._process("vsock", reader, record)
                undo.push_async_callback(helper.end)
                self.process = await self._process("qemu", reader, record)
                undo.push_async_callback(self.process.end)
            finally:
                os.close(reader)
            hybrid = self.directory / "helpers" / "vsock.sock"
            server = _listening(hybrid)
            undo.callback(server.close)
            self.handle = VmHandle(
                id=self.spec.id,
                driver="fake",
                process=self.process.identity,
                helpers=[helper.identity],
                directory=str(self.directory),
                cid=self.spec.cid,
                vsock=str(hybrid),
            )
            self._accepting = self._scope.start(self._accept(server), "vsock")
            self._scope.start(self._watch(guest, helper), "end")
            self._scope.start(self._boot(guest), "boot")
            undo.pop_all()

    async def close(self) -> None:
        """End everything; for the end of a test."""
        self.power_off("the test is over")
        await self._ended.wait()
        await self._scope.close()

    async def _process(self, role: str, reader: int, record: Recorder) -> DetachedProcess:
        async def recorded(identity: ProcessIdentity) -> None:
            await self.faults.at(f"vm.process {role}")
            await record(role, identity)

        # It reads until the power is gone: when the VM is turned off, or when this process ends.
        return await DetachedProcess.spawn(
            ["cat", f"/dev/fd/{reader}"],
            record=recorded,
            log=self.directory / f"{role}.log",
            pass_fds=[reader],
        )

    async def _boot(self, guest: Guest) -> None:
        await self.faults.at("vm.boot")
        await guest.boot(self)

    async def _watch(self, guest: Guest, helper: DetachedProcess) -> None:
        status = await self.process.wait()
        self.reason = self.reason or f"QEMU ended with status {status}: it said nothing"
        await helper.end()
        self.power_off()
        self._accepting.cancel()
        await guest.die()
        self._ended.set()

    async def _accept(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with server:
            while True:
                connection, _ = await loop.sock_accept(server)
                self._scope.start(self._connected(connection), "connection", owning=connection.close)

    async def _connected(self, connection: socket.socket) -> None:
        """Answer "CONNECT port" as vhost-device-vsock does, and join the connection to the guest's."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, ValueError):
            words = (await loop.sock_recv(connection, 64)).split()
            path = self.ports.get(int(words[1])) if words[:1] == [b"CONNECT"] else None
            if path is None:
                return
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as inner:
                await loop.sock_connect(inner, str(path))
                await loop.sock_sendall(connection, b"OK 1073741824\n")
                async with asyncio.TaskGroup() as group:
                    group.create_task(_copy(connection, inner))
                    group.create_task(_copy(inner, connection))


class FakeVm:
    """A daemon's hold of a machine; implements hypervisor.interface.VirtualMachine."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self._closed = False

    @property
    def handle(self) -> VmHandle:
        """What adopt() takes."""
        return self.machine.handle

    def console_tail(self) -> str:
        """Return the last lines of the console."""
        return "\n".join(self.machine.console[-CONSOLE_LINES:])

    async def wait_for_console(self, text: str) -> None:
        """Wait until the console shows a line with this text."""
        await self.machine.wait_for_line(text)

    async def attached_disks(self) -> set[str]:
        """Return the serials of the disks."""
        await self._at("attached_disks")
        return set(self.machine.disks)

    async def attach_disk(self, disk: Disk) -> None:
        """Plug a disk in."""
        await self._at("attach_disk")
        if disk.serial in self.machine.disks:
            raise HypervisorError(f"a disk with the serial {disk.serial} is there already")
        try:
            with disk.path.open("rb" if disk.readonly else "r+b"):
                pass
        except OSError as error:
            raise HypervisorError(f"the disk {disk.path} cannot be opened: {error.strerror}") from error
        self.machine.disks[disk.serial] = disk
        await self._at("attach_disk done")

    async def detach_disk(self, serial: str) -> None:
        """Unplug a disk; unknown: success."""
        await self._at("detach_disk")
        self.machine.disks.pop(serial, None)

    async def attach_nic(self, nic: Nic, tap_fd: int) -> None:
        """Plug a NIC in; any open descriptor will do."""
        await self._at("attach_nic")
        if len(self.machine.nics) == MOST_NICS:
            raise HypervisorError(f"the VM has no free port for {nic.id}: it has {MOST_NICS}")
        try:
            os.fstat(tap_fd)
        except OSError as error:
            raise HypervisorError(f"no tap for {nic.id}: {error.strerror}") from error
        self.machine.nics[nic.id] = nic
        await self._at("attach_nic done")

    async def has_share(self) -> bool:
        """Whether there is a share."""
        await self._at("has_share")
        return bool(self.machine.shares)

    async def attach_share(self, tag: str, backend_fd: int, helper: ProcessIdentity) -> None:
        """Plug a share in; nobody speaks to the backend."""
        await self._at("attach_share")
        if not stat.S_ISSOCK(os.fstat(backend_fd).st_mode):
            raise HypervisorError("the share's backend is no socket")
        self.machine.shares.append(tag)

    async def resize(self, size: VmSize) -> None:
        """Make the machine larger, up to what its spec allows."""
        await self._at("resize")
        spec = self.machine.spec.size
        for what, wanted, limit in (
            ("processors", size.vcpus, max(spec.max_vcpus, spec.vcpus)),
            ("MiB", size.memory_mib, max(spec.max_memory_mib, spec.memory_mib)),
        ):
            if wanted > limit:
                raise HypervisorError(f"the VM has room for {limit} {what}, {wanted} are wanted")
        self.machine.size = VmSize(
            vcpus=max(self.machine.size.vcpus, size.vcpus), memory_mib=max(spec.memory_mib, size.memory_mib)
        )

    async def wait(self) -> str:
        """Wait for the VM's end."""
        return await self.machine.wait()

    async def kill(self) -> None:
        """End the VM."""
        await self.machine.faults.at("vm.kill")
        await self.machine.crash()

    async def close(self) -> None:
        """Let go."""
        self._closed = True

    async def _at(self, step: str) -> None:
        await self.machine.faults.at(f"vm.{step}")
        if self._closed or self.machine.ended:
            raise VmGone("QEMU's monitor is closed: the fake VM is off, or was let go of")


class FakeHypervisor:
    """Implements hypervisor.interface.Hypervisor.

    Attributes:
        machines: Every machine that was started, by sandbox id; adopt() finds them here.
    """

    def __init__(self, guests: Callable[[VmSpec], Guest], faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.machines: dict[str, FakeMachine] = {}
        self._guests = guests

    @property
    def accelerator(self) -> Accelerator:
        """How guests run here: not at all."""
        return Accelerator.TCG

    @property
    def transport(self) -> VsockTransport:
        """How the host reaches guests here."""
        return VsockTransport.VHOST_USER

    async def start(self, spec: VmSpec, record: Recorder) -> FakeVm:
        """Start a machine and boot its guest in the background."""
        await self.faults.at("vm.start")
        for disk in spec.disks:
            if not disk.path.exists():
                raise HypervisorError(f"the disk {disk.path} cannot be opened: No such file or directory")
        machine = FakeMachine(spec, self.faults)
        await machine.launch(self._guests(spec), record)
        self.machines[spec.id] = machine
        try:
            await self.faults.at("vm.start done")
        except BaseException:
            await asyncio.shield(machine.crash())
            raise
        return FakeVm(machine)

    async def adopt(self, handle: VmHandle) -> FakeVm:
        """Take over a machine that an earlier daemon started."""
        await self.faults.at("vm.adopt")
        machine = self.machines.get(handle.id)
        if machine is None or machine.ended or machine.handle.process != handle.process:
            raise VmGone("QEMU ended while no daemon was running")
        return FakeVm(machine)

    async def close(self) -> None:
        """End every machine; for the end of a test."""
        for machine in self.machines.values():
            await machine.close()


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Copy until end-of-file, then say so."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while data := await loop.sock_recv(source, COPY_BYTES):
            await loop.sock_sendall(sink, data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _listening(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        server.bind(str(path))
        server.listen(16)
    except BaseException:
        server.close()
        raise
    return server
