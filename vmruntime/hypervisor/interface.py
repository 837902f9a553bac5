"""What a hypervisor driver does: one VM, its devices, its end."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from vmruntime.aio.detached import ProcessIdentity
from vmruntime.model.image_pod import CpuSetting, DiskDriver, Firmware
from vmruntime.model.resources import VmSize


class Accelerator(enum.Enum):
    """How guest instructions run."""

    KVM = "kvm"
    TCG = "tcg"


class VsockTransport(enum.Enum):
    """How the host reaches the guest's vsock: the kernel's vhost-vsock, or vhost-device-vsock and a unix socket."""

    NATIVE = "native"
    VHOST_USER = "vhost-user"


class Backing(msgspec.Struct, frozen=True, kw_only=True):
    """The read-only image below an overlay; it has none below itself."""

    path: Path
    format: Literal["raw", "qcow2", "vmdk"]


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk; the guest finds it by `serial` (at most 36 characters; virtio-blk passes on 20).

    Attributes:
        path: An image file, or a block device.
        backing: Of a qcow2 overlay. What the file itself says of one is never believed.
        size: Bytes that the guest sees, from the beginning; 0: all there are. For raw disks.
        driver: How the guest sees it.
        cdrom: As a CD-ROM.
    """

    path: Path
    serial: str
    readonly: bool
    format: Literal["raw", "qcow2"] = "raw"
    backing: Backing | None = None
    size: int = 0
    driver: DiskDriver = DiskDriver.SCSI
    cdrom: bool = False


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A virtio-net device on an open tap."""

    id: str
    mac: str


class PluggedNic(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC that a VM of our kernel has from its start.

    Attributes:
        tap_fd: An open tap; it stays the caller's.
    """

    nic: Nic
    tap_fd: int


class KernelBoot(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel of ours, started directly; its end, by whatever way, is the VM's end.

    Attributes:
        arguments: Added to the kernel command line.
    """

    kernel: Path
    initramfs: Path
    arguments: str = ""


class FirmwareBoot(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that boots from its first disk, as a physical one would.

    It is started paused, so that NICs and a share can be plugged in before the guest runs: resume() lets it. It has a serial
    console that is written to DIRECTORY/console.log whether or not a daemon runs, and that one client at a time can join
    by DIRECTORY/console.sock; a channel to the QEMU guest agent at DIRECTORY/qga.sock; a balloon; a pvpanic device.
    A reboot by the guest is a reboot in place.

    Attributes:
        name: What people see in a list of VMs: letters, digits, - . _
        uuid: The machine's, lower case with hyphens.
        variables: UEFI's variables, a writable copy; None with BIOS.
        host_cpu: The CPU is like the host's; else any that the accelerator can do.
        cpu: In place of host_cpu.
        oem_strings: SMBIOS type 11; systemd takes credentials from there (systemd.system-credentials(7)).
        tpm: A swtpm's control socket, listening; None: no TPM.
        vnc: A screen, shown by VNC at DIRECTORY/vnc.sock.
    """

    name: str
    uuid: str
    firmware: Firmware = Firmware.BIOS
    variables: Path | None = None
    host_cpu: bool = False
    cpu: CpuSetting | None = None
    oem_strings: list[str] = []
    tpm: Path | None = None
    vnc: bool = False


class GuestMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of a guest that the caller has made, a memfd (memfd_create(2)) of the VM's size.

    Attributes:
        fd: The memfd; it stays the caller's.
        private: What the guest writes is the VM's own, and the memfd stays as it is (copy-on-write). Helper processes do
            not see such memory: the VM can have neither a share nor a vsock by a helper.
        mergeable: The host's KSM may merge pages of private memory with those of others.
    """

    fd: int
    private: bool = False
    mergeable: bool = False


class VmSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A VM to start.

    Attributes:
        id: Sandbox id.
        directory: Runtime directory for sockets, pid and log files; exists, mode 0711.
        disks: Present from the start.
        cid: vsock context id; 0: no vsock.
        nic: Present from the start.
        memory: None: the driver makes it.
        frozen: No guest is booted: one that was frozen is brought back with VirtualMachine.thaw(), which plugs in the vsock,
            and resume(). The NIC and the disks are those that it was frozen with, on another tap and over copies of their
            files. Only for kernels of ours, with `memory`, and by drivers that can freeze.
    """

    id: str
    size: VmSize
    boot: KernelBoot | FirmwareBoot
    directory: Path
    cid: int
    disks: list[Disk] = []
    nic: PluggedNic | None = None
    memory: GuestMemory | None = None
    frozen: bool = False


class VmHandle(msgspec.Struct, frozen=True, kw_only=True):
    """What a later daemon needs to find a VM again; kept in the store.

    Attributes:
        helpers: Processes that serve the VM, such as vhost-device-vsock.
        vsock: Path of the hybrid vsock socket; empty: the kernel's vsock under `cid`.
        uuid: The machine's, when it was started by firmware; empty: a kernel of ours was booted.
    """

    id: str
    driver: str
    process: ProcessIdentity
    helpers: list[ProcessIdentity]
    directory: str
    cid: int
    vsock: str
    uuid: str = ""


class VmEnd(enum.Enum):
    """How a VM ended."""

    POWEROFF = "poweroff"
    """The guest powered off."""

    CRASH = "crash"
    """The guest's kernel panicked."""

    KILLED = "killed"
    """It was ended on the host: by kill(), by an administrator, by a signal."""

    LOST = "lost"
    """The hypervisor failed, or nobody saw the end."""


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

    async def freeze(self) -> bytes:
        """Stop the guest for good; return its state, which with its memory (VmSpec.memory) is all there is to it.

        What the guest does not use of its memory is given back to the host first. The guest must have no vsock and no
        share, and nothing that was plugged in later.

        Raises:
            HypervisorError: It cannot be frozen, by this driver or now.
        """

    async def thaw(self, state: bytes) -> None:
        """Bring a frozen guest back in a VM that was started for it (VmSpec.frozen), by now with its memory.

        The vsock of the VmSpec is plugged in. The guest stays stopped until resume().

        Raises:
            HypervisorError: The state is damaged, or of another machine.
        """

    async def resume(self) -> None:
        """Let the guest run; it runs already: success."""

    async def pause(self) -> None:
        """Hold the guest's processors; they are held already: success."""

    @property
    def held(self) -> str:
        """Why the guest does not run though nobody paused it, in one sentence; it goes on by itself. Empty: it runs."""

    async def press_power_button(self) -> None:
        """Ask the guest to shut down by ACPI; one that does not listen takes no notice."""

    async def reset(self) -> None:
        """Press the reset button: the guest boots again, with no warning."""

    @property
    def reboots(self) -> int:
        """How often the guest has booted again, seen since the VM was started or adopted."""

    async def balloon_stats(self) -> dict[str, int]:
        """Return what the guest's balloon driver last said of its memory, in bytes, by the names of virtio's statistics.

        Such as stat-total-memory, stat-available-memory; empty: it has said nothing.
        """

    @property
    def end(self) -> VmEnd:
        """How it ended; known once wait() has returned."""

    async def wait(self) -> str:
        """Wait for the end of the VM, or of a helper it cannot do without, and return why, in one sentence.

        A machine started by firmware that powered off or panicked while no daemon was running has ended that way for the
        daemon that adopts it, too; it can be adopted until somebody calls kill().
        """

    async def kill(self) -> None:
        """End the VM and its helpers at once; success when they are gone."""

    async def close(self) -> None:
        """Let go of the VM without ending it."""


class Hypervisor(Protocol):
    """A driver."""

    async def shape(self, spec: VmSpec) -> str:
        """Return a digest of all that a frozen guest depends on: the host, the driver and its programs, the VM.

        Returns:
            The digest; empty: this driver freezes no guests.

        Raises:
            HypervisorError: A file that it depends on cannot be looked at.
        """

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

    async def sweep(self, keep: Iterable[str]) -> list[str]:
        """End the machines started by firmware whose sandbox is none of these, and return whose they were.

        A daemon that died between a machine's start and its record has left one that nothing else leads to.
        """

    async def forget(self, uuid: str) -> None:
        """End a machine started by firmware, and take away what the hypervisor keeps of it; unknown: success."""
