"""Opens what QEMU inherits."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.firmware import find_ovmf
from vmruntime.hypervisor.interface import FirmwareBoot, VmSpec
from vmruntime.hypervisor.qemu.argv import Descriptors
from vmruntime.hypervisor.qemu.blockdev import open_disk
from vmruntime.hypervisor.qemu.machine_argv import MachineDescriptors
from vmruntime.model.image_pod import Firmware

TPM_TIMEOUT = 5.0


def open_descriptors(spec: VmSpec, stack: contextlib.ExitStack, vsock: int | None, *, native: bool) -> Descriptors:
    """Open disks, listening sockets and files; blocks while the transport of a block device is dead.

    Args:
        spec: The VM.
        stack: Closes them: QEMU has its own.
        vsock: What the VM's vsock is on, if it has one.
        native: That is /dev/vhost-vsock.

    Raises:
        HypervisorError: One cannot be opened.
        FailedPrecondition: UEFI is asked for and is not installed.
    """
    disks = [open_disk(disk, stack) for disk in spec.disks]
    return Descriptors(
        qmp=_listening(spec.directory / "qmp.sock", stack),
        console=_listening(spec.directory / "console.sock", stack),
        vsock=vsock,
        vsock_native=native,
        disks=disks,
        memory=None if spec.memory is None else spec.memory.fd,
        tap=None if spec.nic is None else spec.nic.tap_fd,
        machine=_machine(spec.boot, spec.directory, stack) if isinstance(spec.boot, FirmwareBoot) else None,
    )


def _machine(boot: FirmwareBoot, directory: Path, stack: contextlib.ExitStack) -> MachineDescriptors:
    code = variables = None
    if boot.firmware is Firmware.UEFI:
        code = _opened(find_ovmf()[0], os.O_RDONLY, stack)
        if boot.variables is not None:
            variables = _opened(boot.variables, os.O_RDWR, stack)
    return MachineDescriptors(
        log=_opened(directory / "console.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, stack),
        agent=_listening(directory / "qga.sock", stack),
        tpm=None if boot.tpm is None else _connected(boot.tpm, stack),
        code=code,
        variables=variables,
    )


def _opened(path: Path, flags: int, stack: contextlib.ExitStack) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, mode=0o600)
    except OSError as error:
        raise HypervisorError(f"{path} cannot be opened: {error.strerror}") from error
    stack.callback(os.close, fd)
    return fd


def _listening(path: Path, stack: contextlib.ExitStack) -> int:
    server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    path.unlink(missing_ok=True)
    server.bind(str(path))
    path.chmod(0o600)
    server.listen(4)
    return server.fileno()


def _connected(path: Path, stack: contextlib.ExitStack) -> int:
    client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    try:
        client.settimeout(TPM_TIMEOUT)
        client.connect(str(path))
        client.settimeout(None)
    except OSError as error:
        raise HypervisorError(f"the TPM {path} does not answer: {error}") from error
    return client.fileno()
