"""The QEMU driver: starts VMs, and finds them again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import socket
from pathlib import Path

from vmruntime.aio.detached import DetachedProcess
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.devices import Architecture
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.interface import Accelerator, Recorder, VmHandle, VmSpec, VsockTransport
from vmruntime.hypervisor.qemu.argv import Descriptors, qemu_argv
from vmruntime.hypervisor.qemu.monitor import Monitor
from vmruntime.hypervisor.qemu.vm import QemuVm
from vmruntime.hypervisor.vsock import VHOST_VSOCK, connect_backend, helper_argv, tail_of

MONITOR_TIMEOUT = 20.0


class QemuHypervisor:
    """Implements hypervisor.interface.Hypervisor with one QEMU process a VM, unprivileged and sandboxed."""

    def __init__(
        self,
        *,
        qemu: str,
        architecture: Architecture,
        accelerator: Accelerator,
        transport: VsockTransport,
        vsock_program: str,
        user: str,
    ) -> None:
        self._qemu = qemu
        self._architecture = architecture
        self._accelerator = accelerator
        self._transport = transport
        self._vsock_program = vsock_program
        self._user = user

    @property
    def accelerator(self) -> Accelerator:
        """How guests run here."""
        return self._accelerator

    @property
    def transport(self) -> VsockTransport:
        """How the host reaches guests here."""
        return self._transport

    async def start(self, spec: VmSpec, record: Recorder) -> QemuVm:
        """Start a VM; returns when QEMU answers on its monitor.

        Raises:
            HypervisorError: With QEMU's own words; what was started is ended.
        """
        async with contextlib.AsyncExitStack() as undo:
            with contextlib.ExitStack() as descriptors:
                helpers = await self._start_vsock(spec, record, undo, descriptors)
                inherited = self._open_descriptors(spec, descriptors, helpers.connection)
                process = await self._spawn(spec, inherited, record)
            undo.push_async_callback(process.end)
            handle = VmHandle(
                id=spec.id,
                driver="qemu",
                process=process.identity,
                helpers=[helper.identity for helper in helpers.processes],
                directory=str(spec.directory),
                cid=spec.cid,
                vsock="" if self._transport is VsockTransport.NATIVE else str(hybrid_socket(spec.directory)),
            )
            vm = await self._connect(handle, process, helpers.processes)
            undo.pop_all()
            return vm

    async def adopt(self, handle: VmHandle) -> QemuVm:
        """Take over a VM of an earlier daemon.

        Raises:
            VmGone: QEMU or a helper does not run any more, or its monitor is dead.
        """
        process = DetachedProcess(handle.process)
        helpers = [DetachedProcess(identity) for identity in handle.helpers]
        if not process.alive:
            raise VmGone("QEMU ended while no daemon was running")
        if not all(helper.alive for helper in helpers):
            raise VmGone("a helper of the VM ended while no daemon was running")
        return await self._connect(handle, process, helpers)

    async def _start_vsock(
        self, spec: VmSpec, record: Recorder, undo: contextlib.AsyncExitStack, descriptors: contextlib.ExitStack
    ) -> _Vsock:
        if self._transport is VsockTransport.NATIVE:
            fd = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
            descriptors.callback(os.close, fd)
            return _Vsock([], fd)
        directory = helper_directory(spec.directory)
        account = pwd.getpwnam(self._user)
        directory.mkdir(mode=0o700, exist_ok=True)
        os.chown(directory, account.pw_uid, account.pw_gid)
        log = spec.directory / "vsock.log"
        backend = directory / "backend.sock"
        helper = await DetachedProcess.spawn(
            helper_argv(self._vsock_program, spec.cid, backend, hybrid_socket(spec.directory)),
            record=lambda identity: record("vsock", identity),
            log=log,
            user=self._user,
        )
        undo.push_async_callback(helper.end)
        connection = await connect_backend(helper, backend, log)
        descriptors.callback(connection.close)
        return _Vsock([helper], connection.fileno())

    def _open_descriptors(self, spec: VmSpec, stack: contextlib.ExitStack, vsock: int) -> Descriptors:
        def listening(name: str) -> int:
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            stack.callback(server.close)
            path = spec.directory / name
            path.unlink(missing_ok=True)
            server.bind(str(path))
            path.chmod(0o600)
            server.listen(4)
            return server.fileno()

        disks = []
        for disk in spec.disks:
            try:
                fd = os.open(disk.path, (os.O_RDONLY if disk.readonly else os.O_RDWR) | os.O_CLOEXEC)
            except OSError as error:
                raise HypervisorError(f"the disk {disk.path} cannot be opened: {error.strerror}") from error
            stack.callback(os.close, fd)
            disks.append(fd)
        return Descriptors(
            qmp=listening("qmp.sock"),
            console=listening("console.sock"),
            vsock=vsock,
            vsock_native=self._transport is VsockTransport.NATIVE,
            disks=disks,
        )

    async def _spawn(self, spec: VmSpec, descriptors: Descriptors, record: Recorder) -> DetachedProcess:
        return await DetachedProcess.spawn(
            qemu_argv(self._qemu, self._architecture, self._accelerator, spec, descriptors),
            record=lambda identity: record("qemu", identity),
            log=spec.directory / "qemu.log",
            user=self._user,
            pass_fds=descriptors.all(),
        )

    async def _connect(self, handle: VmHandle, process: DetachedProcess, helpers: list[DetachedProcess]) -> QemuVm:
        """Connect to the monitor and get to know the VM; when that fails, nothing stays connected."""
        vm = QemuVm(handle, process, helpers, monitor := Monitor(handle.id[:13]))
        try:
            await _answer(process, monitor, Path(handle.directory))
            await vm.open()
        except BaseException:
            await vm.close()
            raise
        return vm


async def _answer(process: DetachedProcess, monitor: Monitor, directory: Path) -> None:
    """Wait until QEMU's monitor answers, unless QEMU ends first.

    Raises:
        HypervisorError: QEMU ended, with its words; or it runs and does not answer.
    """
    ended = asyncio.ensure_future(process.wait())
    connecting = asyncio.ensure_future(monitor.connect(directory / "qmp.sock"))
    try:
        await asyncio.wait({ended, connecting}, return_when=asyncio.FIRST_COMPLETED, timeout=MONITOR_TIMEOUT)
        if connecting.done() and connecting.exception() is None:
            return
        # The connection breaks a moment before the process is gone, and the process knows why.
        await asyncio.wait({ended}, timeout=0 if not connecting.done() else MONITOR_TIMEOUT)
        if ended.done():
            raise HypervisorError(
                f"QEMU ended at its start (status {ended.result()}): {tail_of(directory / 'qemu.log')}"
            )
        raise HypervisorError(f"QEMU runs, but its monitor does not answer within {MONITOR_TIMEOUT:g} s")
    finally:
        for task in (ended, connecting):
            task.cancel()
        await asyncio.wait({ended, connecting})


class _Vsock:
    def __init__(self, processes: list[DetachedProcess], connection: int) -> None:
        self.processes = processes
        self.connection = connection


def helper_directory(directory: Path) -> Path:
    """Return the one directory of a VM that its unprivileged helpers may write."""
    return directory / "helpers"


def hybrid_socket(directory: Path) -> Path:
    """Return where vhost-device-vsock listens for connections to the guest."""
    return helper_directory(directory) / "vsock.sock"


def find_qemu(configured: str, architecture: Architecture) -> str:
    """Return the QEMU program.

    Raises:
        FailedPrecondition: It is not installed.
    """
    program = shutil.which(configured or architecture.qemu)
    if program is None:
        raise FailedPrecondition(
            f"hypervisor.qemu: {configured or architecture.qemu!r} is not installed",
            remedy="install qemu-system-x86 (Debian, Ubuntu), or run make setup",
        )
    return program
