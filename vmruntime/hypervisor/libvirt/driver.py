"""The libvirt driver: starts domains, and finds them again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pwd
import re
import socket
import uuid as uuids
from collections.abc import Iterable
from pathlib import Path

import structlog

from vmruntime.aio.detached import DetachedProcess, ProcessIdentity, start_time
from vmruntime.aio.pipeline import in_thread
from vmruntime.hypervisor.devices import Architecture
from vmruntime.hypervisor.disks import check_disks
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.firmware import find_ovmf
from vmruntime.hypervisor.helpers import account_of, make_helper_directory, start_vsock, take_screen
from vmruntime.hypervisor.interface import (
    Accelerator,
    Disk,
    FirmwareBoot,
    KernelBoot,
    Recorder,
    VmEnd,
    VmHandle,
    VmSpec,
    VsockTransport,
)
from vmruntime.hypervisor.libvirt import domains
from vmruntime.hypervisor.libvirt.binding import libvirt, readable
from vmruntime.hypervisor.libvirt.connection import Connection
from vmruntime.hypervisor.libvirt.domain import (
    Machine,
    backing_group,
    disk_group,
    domain_xml,
)
from vmruntime.hypervisor.libvirt.ending import Ending, told_by_libvirt
from vmruntime.hypervisor.libvirt.monitor import Monitor
from vmruntime.hypervisor.libvirt.place import is_embedded, may_use, prepare_embedded
from vmruntime.hypervisor.libvirt.plug import plug_agent, plug_console, plug_vsock
from vmruntime.hypervisor.libvirt.vm import AFTERMATH, POLL_SECONDS, EndedVm, LibvirtVm
from vmruntime.hypervisor.qemu.blockdev import open_disk
from vmruntime.hypervisor.vsock import hybrid_socket
from vmruntime.model.image_pod import Firmware

log = structlog.get_logger(__name__)

# libvirt may have to learn first what this QEMU can do; under load that takes a while.
CREATE_TIMEOUT = 120.0
_NAMESPACE = uuids.UUID("5c1a0c5e-9d5b-4f0c-8f5a-0f3c1f5f7a52")


class LibvirtHypervisor:
    """Implements hypervisor.interface.Hypervisor with one domain a VM."""

    def __init__(
        self,
        connection: Connection,
        *,
        owner: str,
        emulator: str,
        architecture: Architecture,
        accelerator: Accelerator,
        transport: VsockTransport,
        vsock_program: str,
        user: str,
        security: list[str],
    ) -> None:
        self._connection = connection
        self._owner = owner
        self._emulator = emulator
        self._architecture = architecture
        self._accelerator = accelerator
        self._transport = transport
        self._vsock_program = vsock_program
        self._user = user
        self._security = security

    @property
    def accelerator(self) -> Accelerator:
        """How guests run here."""
        return self._accelerator

    @property
    def transport(self) -> VsockTransport:
        """How the host reaches guests here."""
        return self._transport

    @property
    def uri(self) -> str:
        """Where libvirt is."""
        return self._connection.uri

    async def close(self) -> None:
        """Disconnect from libvirt; VMs go on."""
        await self._connection.close()

    async def shape(self, spec: VmSpec) -> str:
        """Return nothing: guests are not frozen here."""
        return ""

    async def start(self, spec: VmSpec, record: Recorder) -> LibvirtVm:
        """Start a VM; one started by firmware is held until resume().

        Raises:
            HypervisorError: With libvirt's or QEMU's own words; what was started is ended.
        """
        check_disks(spec.disks)
        firmware = isinstance(spec.boot, FirmwareBoot)
        uuid = spec.boot.uuid if isinstance(spec.boot, FirmwareBoot) else _derived(spec.id)
        helpers: list[DetachedProcess] = []
        async with contextlib.AsyncExitStack() as undo:
            with contextlib.ExitStack() as descriptors:
                vsock: socket.socket | None = None
                if spec.cid and self._transport is VsockTransport.VHOST_USER:
                    helper, vsock = await start_vsock(spec, self._vsock_program, self._user, record, undo)
                    descriptors.callback(vsock.close)
                    helpers.append(helper)
                native = [disk for disk in spec.disks if firmware and not disk.path.is_block_device()]
                groups = await in_thread(functools.partial(_open_all, native, descriptors))
                undo.push_async_callback(self._undo, uuid)
                process = await self._create(spec, uuid, native, groups)
                undo.push_async_callback(process.end)
                await record("qemu", process.identity)
                handle = VmHandle(
                    id=spec.id,
                    driver="libvirt",
                    process=process.identity,
                    helpers=[helper.identity for helper in helpers],
                    directory=str(spec.directory),
                    cid=spec.cid,
                    vsock=str(hybrid_socket(spec.directory)) if helpers else "",
                    uuid=uuid if firmware else "",
                )
                vm = LibvirtVm(handle, uuid, self._connection, helpers, {disk.serial for disk in native})
                undo.push_async_callback(vm.close)
                await plug_console(vm.monitor, spec.directory, logged=firmware)
                if vsock is not None:
                    await plug_vsock(vm.monitor, vsock.fileno())
            await vm.open()
            await self._complete(vm, spec, native)
            undo.pop_all()
            return vm

    async def adopt(self, handle: VmHandle) -> LibvirtVm:
        """Take over a VM of an earlier daemon.

        Raises:
            VmGone: It does not run any more.
        """
        uuid = handle.uuid or _derived(handle.id)
        helpers = [DetachedProcess(identity) for identity in handle.helpers]
        state, serials = await self._look_up(uuid)
        if not DetachedProcess(handle.process).alive:
            return await self._ended(handle, uuid, helpers)
        if state is None:
            raise VmGone(f"libvirt ({self.uri}) does not know the VM")
        if not all(helper.alive for helper in helpers):
            raise VmGone("a helper of the VM ended while no daemon was running")
        vm = LibvirtVm(handle, uuid, self._connection, helpers, serials)
        try:
            await vm.open()
        except VmGone:
            # libvirt, that is the driver inside this process as well, has only now found out that the guest is off.
            await vm.close()
            return await self._ended(handle, uuid, helpers)
        except BaseException:
            await vm.close()
            raise
        return vm

    async def _ended(self, handle: VmHandle, uuid: str, helpers: list[DetachedProcess]) -> EndedVm:
        """Return a machine that ended while no daemon was running, if libvirt remembers that its guest ended it.

        Raises:
            VmGone: It does not.
        """
        ending = await self._noticed_end(uuid) if handle.uuid else None
        if ending is None or ending.end not in (VmEnd.POWEROFF, VmEnd.CRASH):
            raise VmGone("QEMU ended while no daemon was running")
        return EndedVm(handle, uuid, self._connection, helpers, ending)

    async def forget(self, uuid: str) -> None:
        """End a machine started by firmware, and let libvirt forget it; unknown: success.

        Raises:
            HypervisorError: libvirt refused, or does not answer.
        """
        try:
            await self._remove(uuid)
        except libvirt.libvirtError as error:
            raise HypervisorError(f"libvirt refused to forget the machine {uuid}: {error}") from error

    async def sweep(self, keep: Iterable[str]) -> list[str]:
        """End and forget the domains of this owner that no pod of `keep` (sandbox ids) has; return whose they were.

        A daemon that died between a domain's start and its record has left one that nothing else leads to.
        """
        kept = set(keep)
        found = await self._connection.call(lambda c: domains.of_owner(c, self._owner), what="list of domains")
        strays = {uuid: pod for uuid, pod in found.items() if pod not in kept}
        for uuid in strays:
            await self.forget(uuid)
        return sorted(strays.values())

    async def _create(
        self, spec: VmSpec, uuid: str, native: list[Disk], groups: dict[str, list[int]]
    ) -> DetachedProcess:
        account = account_of(self._user)
        xml = domain_xml(self._machine(spec, uuid, native, account))
        await in_thread(lambda: _hand_over(spec, account))
        keep = isinstance(spec.boot, FirmwareBoot)
        try:
            await self._connection.call(
                lambda c: domains.create(c, uuid, xml, groups, owner=self._owner, keep=keep),
                what="start of the VM",
                timeout=CREATE_TIMEOUT,
                repeatable=False,
            )
        except libvirt.libvirtError as error:
            raise HypervisorError(f"libvirt did not start the VM: {error}") from error
        return DetachedProcess(await self._identity(uuid))

    def _machine(self, spec: VmSpec, uuid: str, native: list[Disk], account: pwd.struct_passwd) -> Machine:
        boot = spec.boot
        return Machine(
            spec=spec,
            uuid=uuid,
            name=boot.name if isinstance(boot, FirmwareBoot) else f"vmruntime-{spec.id[:13]}",
            disks=native,
            architecture=self._architecture,
            accelerator=self._accelerator,
            emulator=self._emulator,
            owner=self._owner,
            uid=account.pw_uid,
            gid=account.pw_gid,
            security=self._security,
            loader=_loader(boot),
            vsock_native=self._transport is VsockTransport.NATIVE,
        )

    async def _identity(self, uuid: str) -> ProcessIdentity:
        """Return QEMU's process: the one that the thread of its first processor belongs to."""
        cpus = await Monitor(self._connection, uuid).execute("query-cpus-fast")
        pid = _process_of(int(cpus[0]["thread-id"]))
        started = None if pid is None else start_time(pid)
        if pid is None or started is None:
            raise VmGone("QEMU ended at its start")
        return ProcessIdentity(pid=pid, start_time=started)

    async def _complete(self, vm: LibvirtVm, spec: VmSpec, native: list[Disk]) -> None:
        """Plug in what libvirt does not know of; a kernel of ours may run then."""
        for disk in spec.disks:
            if disk in native:
                continue
            if disk is spec.disks[0] and isinstance(spec.boot, FirmwareBoot):
                await vm.attach_boot_disk(disk)
            else:
                await vm.attach_disk(disk)
        if isinstance(spec.boot, FirmwareBoot):
            await plug_agent(vm.monitor, spec.directory)
            if spec.boot.vnc:
                take_screen(spec.directory)
        else:
            await vm.resume()

    async def _look_up(self, uuid: str) -> tuple[tuple[int, int] | None, set[str]]:
        def look(connection: libvirt.virConnect) -> tuple[tuple[int, int] | None, set[str]]:
            return domains.state_of(connection, uuid), domains.serials_of(connection, uuid)

        try:
            return await self._connection.call(look, what="state of the VM")
        except libvirt.libvirtError as error:
            raise HypervisorError(f"libvirt does not say how the VM {uuid} is: {error}") from error

    async def _noticed_end(self, uuid: str) -> Ending | None:
        """Return the end that libvirt remembers of a domain whose QEMU has ended; None: of none.

        libvirt notices an end when the process has been collected, which a busy init does when it comes to it.
        """
        deadline = asyncio.get_running_loop().time() + AFTERMATH
        while True:
            state, _ = await self._look_up(uuid)
            ending = None if state is None else told_by_libvirt(*state)
            if state is None or ending is not None or asyncio.get_running_loop().time() > deadline:
                return ending
            await asyncio.sleep(POLL_SECONDS)

    async def _undo(self, uuid: str) -> None:
        """Take back a start; a failure of that must not hide the one that led here."""
        try:
            await self._remove(uuid)
        except (HypervisorError, libvirt.libvirtError) as error:
            log.warning("a domain that was not to start may be left", uuid=uuid, error=str(error))

    async def _remove(self, uuid: str) -> None:
        await self._connection.call(
            lambda c: domains.remove(c, uuid, self._owner), what="end of the VM", timeout=CREATE_TIMEOUT
        )


async def open_libvirt(
    uri: str,
    *,
    owner: Path,
    emulator: str,
    architecture: Architecture,
    accelerator: Accelerator,
    transport: VsockTransport,
    vsock_program: str,
    user: str,
) -> LibvirtHypervisor:
    """Connect to libvirt; close() is the caller's.

    Args:
        uri: As choose_uri() returns it.
        owner: A directory that this daemon alone has: its machines are told by it from those of others.
        emulator: Path of QEMU.
        architecture: The host's.
        accelerator: How guests run.
        transport: How the host reaches a guest's vsock.
        vsock_program: Path of vhost-device-vsock.
        user: Account that QEMU and the helpers run as.

    Raises:
        FailedPrecondition: The account does not exist.
        HypervisorError: libvirt does not answer.
    """
    account = account_of(user)
    if is_embedded(uri):
        await in_thread(lambda: prepare_embedded(uri, account))
    connection = await Connection.open(uri)
    try:
        # Inside the process there is none, and to ask means to try every QEMU of the host first.
        ask = domains.security_models
        security = (
            [] if is_embedded(uri) else await connection.call(ask, what="its security model", timeout=CREATE_TIMEOUT)
        )
    except BaseException:
        await connection.close()
        raise
    return LibvirtHypervisor(
        connection,
        owner=str(owner),
        emulator=emulator,
        architecture=architecture,
        accelerator=accelerator,
        transport=transport,
        vsock_program=vsock_program,
        user=user,
        security=security,
    )


async def probe(uri: str) -> str:
    """Return libvirt's and QEMU's version, for people. The driver inside a process is left alone: it is a daemon's.

    Raises:
        HypervisorError: Nobody answers there, or a libvirt that is too old.
    """
    if is_embedded(uri):
        return f"libvirt {readable(libvirt.getVersion())} inside the daemon"
    connection = await Connection.open(uri)
    try:
        library, qemu = await connection.call(lambda c: (c.getLibVersion(), c.getVersion()), what="its version")
    except libvirt.libvirtError as error:
        raise HypervisorError(f"libvirt ({uri}) does not say its version: {error}") from error
    finally:
        await connection.close()
    return f"libvirt {readable(library)} at {uri}, QEMU {readable(qemu)}"


def _derived(sandbox_id: str) -> str:
    """Return the uuid of a machine that has none of its own."""
    return str(uuids.uuid5(_NAMESPACE, sandbox_id))


def _loader(boot: KernelBoot | FirmwareBoot) -> Path | None:
    if not isinstance(boot, FirmwareBoot) or boot.firmware is not Firmware.UEFI:
        return None
    code, _ = find_ovmf()
    return code


def _hand_over(spec: VmSpec, account: pwd.struct_passwd) -> None:
    """Let QEMU's account have what QEMU opens by itself: UEFI's variables, the TPM's socket, a place for VNC's.

    Raises:
        HypervisorError: It cannot be given, or a directory above is closed to the account.
    """
    boot = spec.boot
    if not isinstance(boot, FirmwareBoot):
        return
    if boot.vnc:
        make_helper_directory(spec.directory, account.pw_name)
    for path in (boot.variables, boot.tpm):
        if path is None:
            continue
        try:
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        except OSError as error:
            raise HypervisorError(f"{path} cannot be given to {account.pw_name}: {error.strerror}") from error
        for above in path.parents:
            if not may_use(above, account, execute=True):
                raise HypervisorError(f"{path} is of no use: {account.pw_name} cannot pass through {above}")


def _process_of(thread: int) -> int | None:
    try:
        status = Path(f"/proc/{thread}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = re.search(r"^Tgid:\s*(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else None


def _open_all(native: list[Disk], stack: contextlib.ExitStack) -> dict[str, list[int]]:
    """Open the files that libvirt passes on to QEMU, by their groups."""
    groups: dict[str, list[int]] = {}
    for number, disk in enumerate(native):
        opened = open_disk(disk, stack)
        groups[disk_group(number)] = [opened.fd]
        if opened.backing is not None:
            groups[backing_group(number)] = [opened.backing]
    return groups
