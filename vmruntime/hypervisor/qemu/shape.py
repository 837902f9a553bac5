"""What the state of a frozen guest depends on."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import msgspec

from vmruntime.hypervisor.devices import Architecture
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Accelerator, GuestMemory, KernelBoot, VmSpec
from vmruntime.hypervisor.qemu.argv import Descriptors, qemu_argv
from vmruntime.hypervisor.qemu.blockdev import OpenDisk

CPU_LINES = (
    "vendor_id",
    "cpu family",
    "model",
    "stepping",
    "microcode",
    "flags",
    "CPU implementer",
    "CPU part",
    "Features",
)
"""Of /proc/cpuinfo: a guest that saw a processor's features must not wake up on another one."""


def guest_shape(qemu: str, architecture: Architecture, accelerator: Accelerator, spec: VmSpec) -> str:
    """Return a digest of QEMU, its arguments but for what is each VM's own, the guest's files and the processor. Blocks.

    Raises:
        HypervisorError: A file cannot be looked at.
    """
    assert isinstance(spec.boot, KernelBoot)
    nic = None if spec.nic is None else msgspec.structs.replace(spec.nic, tap_fd=6)
    own = {"id": "0" * 64, "cid": 0, "directory": Path("/"), "memory": GuestMemory(fd=5), "frozen": False, "nic": nic}
    same = msgspec.structs.replace(spec, **own)
    disks = [OpenDisk(fd=7 + number) for number in range(len(spec.disks))]
    descriptors = Descriptors(qmp=3, console=4, vsock=None, vsock_native=False, disks=disks, memory=5, tap=6)
    parts = [
        *qemu_argv(qemu, architecture, accelerator, same, descriptors),
        *(_identity(path) for path in (Path(qemu), spec.boot.kernel, spec.boot.initramfs)),
        *_host(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _identity(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise HypervisorError(f"{path} cannot be looked at: {error.strerror}") from error
    return (
        f"{path.resolve()} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    )


@functools.cache
def _host() -> tuple[str, ...]:
    """Return what cannot change while this program runs, or does not reach guests before another one is started.

    The kernel and KVM's settings decide which of the processor's features a guest sees.
    """
    first: list[str] = []
    with Path("/proc/cpuinfo").open() as file:
        for line in file:  # up to the end of the first processor: there may be hundreds
            if not line.strip():
                break
            if line.partition("\t")[0].rstrip() in CPU_LINES:
                first.append(line.strip())
    settings = [
        path
        for module in ("kvm", "kvm_intel", "kvm_amd")
        for path in Path(f"/sys/module/{module}").glob("parameters/*")
    ]
    return (os.uname().release, *first, *(f"{path} {_text(path)}" for path in sorted(settings)))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
