"""What a hypervisor driver does: one VM, its devices, its end."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec

from vmruntime.aio.detached import ProcessIdentity
from vmruntime.model.resources import VmSize


class Accelerator(enum.Enum):
    """How guest instructions run."""

    KVM = "kvm"
    TCG = "tcg"


class VsockTransport(enum.Enum):
    """How the host reaches the guest's vsock: the kernel's vhost-vsock, or vhost-device-vsock and a unix socket."""

    NATIVE = "native"
    VHOST_USER = "vhost-user"


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A raw disk image; the guest finds it by `serial` (at most 36 characters)."""

    path: Path
    serial: str
    readonly: bool


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A virtio-net device on an open tap."""

    id: str
    mac: str


class VmSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A VM to start.

    Attributes:
        id: Sandbox id.
        directory: Runtime directory for sockets, pid and log files; exists, mode 0700.
        disks: Present from the start.
        cid: vsock context id.
    """

    id: str
    size: VmSize
    kernel: Path
    initramfs: Path
    kernel_args: str
    directory: Path
    cid: int
    disks: list[Disk] = []


class VmHandle(msgspec.Struct, frozen=True, kw_only=True):
    """What a later daemon needs to find a VM again; kept in the store.

    Attributes:
        helpers: Processes that serve the VM, such as vhost-device-vsock.
        vsock: Path of the hybrid vsock socket; empty: the kernel's vsock under `cid`.
    """

    id: str
    driver: str
    process: ProcessIdentity
    helpers: list[ProcessIdentity]
    directory: str
    cid: int
    vsock: str


Recorder = Callable[[str, ProcessIdentity], Awaitable[None]]
"""Told the role ("qemu", "vsock") and identity of a process."""


class VirtualMachine(Protocol):
    """A running VM."""

    @property
    def handle(self) -> VmHandle:
        """What adopt() takes."""

    def console_tail(self) -> str:
        """Return the last lines of the guest's console, for an error message."""

    async def wait_for_console(self, text: str) -> None:
        """Wait until the guest's console shows a line with this text; for a VM that was just started."""

    async def attached_disks(self) -> set[str]:
        """Return the serials of the disks the VM has."""

    async def attach_disk(self, disk: Disk) -> None:
        """Hot-plug a disk.

        Raises:
            HypervisorError: The hypervisor refused; nothing stays attached.
        """

    async def detach_disk(self, serial: str) -> None:
        """Unplug a disk the guest has let go of; unknown serial: success."""

    async def attach_nic(self, nic: Nic, tap_fd: int) -> None:
        """Hot-plug a NIC on a tap; the descriptor stays the caller's."""

    async def has_share(self) -> bool:
        """Whether attach_share() has succeeded for this VM, under this daemon or an earlier one."""

    async def attach_share(self, tag: str, backend_fd: int, helper: ProcessIdentity) -> None:
        """Hot-plug a virtio-fs device on a connection to virtiofsd; the descriptor stays the caller's.

        Args:
            tag: The name the guest mounts it by, at most 36 bytes.
            backend_fd: A connected vhost-user socket.
            helper: virtiofsd; from now on its end is the VM's end.
        """

    async def resize(self, size: VmSize) -> None:
        """Plug in processors up to `size.vcpus` and make memory `size.memory_mib`, never less than it was started with.

        Processors are never taken away: limits inside the guest hold them back, and guests may refuse.

        Raises:
            HypervisorError: The VM cannot become so large; nothing is half-done that a second call would not mend.
        """

    async def wait(self) -> str:
        """Wait for the end of the VM, or of a helper it cannot do without, and return why, in one sentence."""

    async def kill(self) -> None:
        """End the VM and its helpers at once; success when they are gone."""

    async def close(self) -> None:
        """Let go of the VM without ending it."""


class Hypervisor(Protocol):
    """A driver."""

    async def start(self, spec: VmSpec, record: Recorder) -> VirtualMachine:
        """Start a VM; returns when the hypervisor runs it, not when the guest is up.

        Args:
            spec: The VM.
            record: Awaited for each process before it runs; if it raises, the process never does.

        Raises:
            HypervisorError: With the hypervisor's own words; everything it started is ended.
        """

    async def adopt(self, handle: VmHandle) -> VirtualMachine:
        """Take over a VM of an earlier daemon.

        Raises:
            VmGone: It does not run any more.
        """
