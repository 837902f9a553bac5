"""The QEMU driver: starts VMs, and finds them again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from vmruntime import tracing
from vmruntime.aio.beside import together
from vmruntime.aio.detached import DetachedProcess
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.devices import Architecture
from vmruntime.hypervisor.disks import check_disks
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.helpers import make_helper_directory, start_vsock, take_screen
from vmruntime.hypervisor.interface import Accelerator, FirmwareBoot, Recorder, VmHandle, VmSpec, VsockTransport
from vmruntime.hypervisor.qemu.aio import THREADS
from vmruntime.hypervisor.qemu.argv import Descriptors, qemu_argv
from vmruntime.hypervisor.qemu.descriptors import open_descriptors
from vmruntime.hypervisor.qemu.monitor import Monitor
from vmruntime.hypervisor.qemu.shape import guest_shape
from vmruntime.hypervisor.qemu.vm import QemuVm, Waiting
from vmruntime.hypervisor.vsock import VHOST_VSOCK, hybrid_socket, tail_of

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
        aio: str = THREADS,
    ) -> None:
        """Take what VMs are made with; aio: see aio.py."""
        self._aio = aio
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
            InvalidArgument: A field of the spec cannot be used.
            FailedPrecondition: This host, or QEMU by itself, cannot do it.
        """
        check_disks(spec.disks)
        if spec.frozen:
            return await self._start_frozen(spec, record)
        boot = spec.boot if isinstance(spec.boot, FirmwareBoot) else None
        async with contextlib.AsyncExitStack() as undo:
            with contextlib.ExitStack() as descriptors:
                if boot is not None and boot.vnc:
                    make_helper_directory(spec.directory, self._user)
                helpers = await self._start_vsock(spec, record, undo, descriptors)
                native = self._transport is VsockTransport.NATIVE
                inherited = await in_thread(
                    lambda: open_descriptors(spec, descriptors, helpers.connection, native=native)
                )
                process = await self._spawn(spec, inherited, record)
            undo.push_async_callback(process.end)
            vm = await self._connect(_handle(spec, process, helpers), process, helpers.processes)
            undo.push_async_callback(vm.close)
            if boot is not None and boot.vnc:
                take_screen(spec.directory)
            undo.pop_all()
            return vm

    async def shape(self, spec: VmSpec) -> str:
        """Return a digest of QEMU and its arguments, the kernel and initramfs as files, and the host's processor."""
        return await in_thread(lambda: guest_shape(self._qemu, self._architecture, self._accelerator, spec))

    async def _start_frozen(self, spec: VmSpec, record: Recorder) -> QemuVm:
        """Start a VM whose guest is brought back; its vsock's helper starts beside QEMU, which gets it later."""
        native = self._transport is VsockTransport.NATIVE
        bare = msgspec.structs.replace(spec, cid=0)
        async with contextlib.AsyncExitStack() as undo:
            later = undo.enter_context(contextlib.ExitStack())
            helpers = _Vsock([], None)
            started: list[DetachedProcess] = []

            async def start_helper() -> None:
                nonlocal helpers
                helpers = await self._start_vsock(spec, record, undo, later)

            async def start_qemu() -> None:
                with contextlib.ExitStack() as descriptors:
                    inherited = await in_thread(lambda: open_descriptors(bare, descriptors, None, native=native))
                    started.append(await self._spawn(bare, inherited, record))
                undo.push_async_callback(started[0].end)

            await together(start_helper(), start_qemu())
            waiting = Waiting(vsock=helpers.connection, native=native, closing=later)
            handle = _handle(spec, started[0], helpers)
            vm = await self._connect(handle, started[0], helpers.processes, waiting)
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

    async def sweep(self, keep: Iterable[str]) -> list[str]:
        """Find nothing: a process is in the ledger before it becomes QEMU."""
        return []

    async def forget(self, uuid: str) -> None:
        """Do nothing: a VM leaves nothing behind here but its process."""

    async def _start_vsock(
        self, spec: VmSpec, record: Recorder, undo: contextlib.AsyncExitStack, descriptors: contextlib.ExitStack
    ) -> _Vsock:
        if spec.cid == 0:
            return _Vsock([], None)
        if self._transport is VsockTransport.NATIVE:
            fd = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
            descriptors.callback(os.close, fd)
            return _Vsock([], fd)
        helper, connection = await start_vsock(spec, self._vsock_program, self._user, record, undo)
        descriptors.callback(connection.close)
        return _Vsock([helper], connection.fileno())

    @tracing.timed("vm.process")
    async def _spawn(self, spec: VmSpec, descriptors: Descriptors, record: Recorder) -> DetachedProcess:
        return await DetachedProcess.spawn(
            qemu_argv(self._qemu, self._architecture, self._accelerator, spec, descriptors, self._aio),
            record=lambda identity: record("qemu", identity),
            log=spec.directory / "qemu.log",
            user=self._user,
            pass_fds=descriptors.all(),
        )

    async def _connect(
        self,
        handle: VmHandle,
        process: DetachedProcess,
        helpers: list[DetachedProcess],
        waiting: Waiting | None = None,
    ) -> QemuVm:
        """Connect to the monitor and get to know the VM; when that fails, nothing stays connected."""
        vm = QemuVm(handle, process, helpers, monitor := Monitor(handle.id[:13]), waiting, aio=self._aio)
        try:
            await _answer(process, monitor, Path(handle.directory))
            await vm.open()
        except BaseException:
            await vm.close()
            raise
        return vm


@tracing.timed("vm.monitor")
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
    def __init__(self, processes: list[DetachedProcess], connection: int | None) -> None:
        self.processes = processes
        self.connection = connection


def _handle(spec: VmSpec, process: DetachedProcess, helpers: _Vsock) -> VmHandle:
    return VmHandle(
        id=spec.id,
        driver="qemu",
        process=process.identity,
        helpers=[helper.identity for helper in helpers.processes],
        directory=str(spec.directory),
        cid=spec.cid,
        vsock=str(hybrid_socket(spec.directory)) if helpers.processes else "",
        uuid=spec.boot.uuid if isinstance(spec.boot, FirmwareBoot) else "",
    )


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
