"""QEMU's command line, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vmruntime.hypervisor.devices import Architecture
from vmruntime.hypervisor.helpers import SCREEN_SOCKET
from vmruntime.hypervisor.interface import Accelerator, FirmwareBoot, KernelBoot, VmSpec
from vmruntime.hypervisor.qemu.aio import SANDBOX, THREADS
from vmruntime.hypervisor.qemu.blockdev import OpenDisk, disk_arguments
from vmruntime.hypervisor.qemu.cpu import smp_argument
from vmruntime.hypervisor.qemu.machine_argv import BALLOON, MachineDescriptors, Parts, machine_parts, root_ports
from vmruntime.hypervisor.vsock import helper_directory
from vmruntime.model.resources import VmSize

MEMORY_BLOCK_MIB = 128
MOST_QUEUES = 4
"""Each takes memory of every guest."""

MEMORY = "memory"


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    """Open descriptors that QEMU inherits, by number.

    Attributes:
        qmp, console: Listening unix sockets.
        vsock: A connection to vhost-device-vsock, or /dev/vhost-vsock; None: no vsock.
        disks: Those of each disk of the VmSpec, in order.
        memory, tap: The memfd and the tap of the VmSpec.
        machine: Those of a machine that boots from its disk.
    """

    qmp: int
    console: int
    vsock: int | None
    vsock_native: bool
    disks: list[OpenDisk]
    memory: int | None = None
    tap: int | None = None
    machine: MachineDescriptors | None = None

    def all(self) -> list[int]:
        """Return every descriptor."""
        return [
            self.qmp,
            self.console,
            *([] if self.vsock is None else [self.vsock]),
            *(fd for disk in self.disks for fd in disk.all()),
            *(fd for fd in (self.memory, self.tap) if fd is not None),
            *([] if self.machine is None else self.machine.all()),
        ]


def qemu_argv(
    qemu: str,
    architecture: Architecture,
    accelerator: Accelerator,
    spec: VmSpec,
    descriptors: Descriptors,
    aio: str = THREADS,
) -> list[str]:
    """Return the arguments that start one VM.

    QEMU opens no path but the kernel and initramfs: disks and sockets are descriptors, so the account it runs as needs
    no rights to the files of pods and images.

    Raises:
        FailedPrecondition: QEMU has no such machine.
        InvalidArgument: A field of the VmSpec cannot be used.
    """
    parts = _parts(architecture, accelerator, spec, descriptors)
    return [
        qemu,
        *("-name", f"guest={parts.name},debug-threads=on"),
        *("-machine", f"{parts.machine},memory-backend=ram,mem-merge={_merge(spec)}"),
        *("-accel", _accel(accelerator)),
        *("-cpu", parts.cpu),
        *("-smp", parts.smp),
        *("-m", _memory(spec.size)),
        *("-object", _base_memory(spec, descriptors)),
        *("-nodefaults", "-no-user-config", *parts.ending, "-display", "none", "-msg", "timestamp=on"),
        *("-sandbox", SANDBOX),
        *("-chardev", f"socket,id=qmp,fd={descriptors.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={descriptors.console},server=on,wait=off{parts.console}"),
        *("-serial", "chardev:console"),
        *parts.boot,
        *("-device", "virtio-rng-pci"),
        *("-device", f"virtio-scsi-pci,id=scsi0,num_queues={_queues(spec.size)}"),
        *_vsock(spec.cid, descriptors),
        *parts.ports,
        *_nic(spec),
        *disk_arguments(spec.disks, descriptors.disks, boot=descriptors.machine is not None, aio=aio),
        *architecture.extra,
    ]


def _parts(architecture: Architecture, accelerator: Accelerator, spec: VmSpec, descriptors: Descriptors) -> Parts:
    if isinstance(spec.boot, FirmwareBoot):
        assert descriptors.machine is not None
        screen = helper_directory(spec.directory) / SCREEN_SOCKET
        return machine_parts(spec, spec.boot, architecture, accelerator, descriptors.machine, screen)
    return Parts(
        name=f"vmruntime-{spec.id[:13]}",
        machine=architecture.machine,
        cpu=architecture.cpu[accelerator.value],
        smp=smp_argument(spec.size),
        ending=["-no-reboot"],
        # A frozen guest has booted: QEMU would only keep kernel and initramfs in memory.
        boot=[*(("-incoming", "defer") if spec.frozen else _kernel(spec.boot, architecture)), *_balloon()],
        ports=root_ports(),
    )


def _kernel(boot: KernelBoot, architecture: Architecture) -> Sequence[str]:
    command_line = kernel_command_line(architecture, boot.arguments)
    return ("-kernel", str(boot.kernel), "-initrd", str(boot.initramfs), "-append", command_line)


def kernel_command_line(architecture: Architecture, extra: str) -> str:
    """Return the guest kernel's arguments.

    panic=-1 with -no-reboot turns a kernel panic into an exit of QEMU instead of a VM that hangs. no_timer_check: an
    emulated guest on a busy host can miss the ticks with which the kernel tries its timer, and panics for it ("IO-APIC +
    timer doesn't work"); under KVM the kernel leaves that out by itself.
    """
    base = f"console={architecture.serial} quiet loglevel=4 panic=-1 reboot=t i8042.noaux i8042.nokbd tsc=reliable"
    # dummy: else every guest has a dummy0, and those that start from one template the same MAC address on it.
    base += " no_timer_check dummy.numdummies=0"
    # Memory that is plugged in is used at once, and kept free of what cannot be moved away again.
    return f"{base} memhp_default_state=online_movable {extra}".strip()


def _memory(size: VmSize) -> str:
    """Return how much memory there is and may be: more by whole memory blocks of the guest (128 MiB on x86-64)."""
    growth = max(0, size.max_memory_mib - size.memory_mib) // MEMORY_BLOCK_MIB * MEMORY_BLOCK_MIB
    # QEMU tells the maximum only where there are slots; virtio-mem takes none of them.
    more = f",slots=1,maxmem={size.memory_mib + growth}M" if growth else ""
    return f"size={size.memory_mib}M{more}"


def _base_memory(spec: VmSpec, descriptors: Descriptors) -> str:
    """Return the memory that the VM has from the start.

    vhost-user backends (vhost-device-vsock, virtiofsd) map the guest's memory, hence a shared memfd.
    """
    size = f"id=ram,size={spec.size.memory_mib}M"
    if spec.memory is None:
        return f"memory-backend-memfd,{size},share=on"
    share = "off" if spec.memory.private else "on"
    return f"memory-backend-file,{size},mem-path=/proc/self/fd/{descriptors.memory},share={share}"


def _merge(spec: VmSpec) -> str:
    """Return whether KSM may merge the guest's pages. QEMU would let it, and time then tells one guest what others have."""
    return "on" if spec.memory is not None and spec.memory.mergeable else "off"


def memory_backend(size_mib: int) -> dict[str, object]:
    """Return the object-add arguments of memory to plug in; it takes no host memory until the guest uses it."""
    return {
        "qom-type": "memory-backend-memfd",
        "id": MEMORY,
        "size": size_mib * 1024 * 1024,
        "share": True,
        "reserve": False,
    }


def memory_device(port: int) -> dict[str, object]:
    """Return the device_add arguments of the virtio-mem device that gives the guest that memory piece by piece."""
    return {"driver": "virtio-mem-pci", "id": f"at{port}-{MEMORY}", "memdev": MEMORY, "bus": f"port{port}"}


def _accel(accelerator: Accelerator) -> str:
    return "kvm" if accelerator is Accelerator.KVM else "tcg,thread=multi"


def _vsock(cid: int, descriptors: Descriptors) -> Sequence[str]:
    if descriptors.vsock is None:
        return ()
    if descriptors.vsock_native:
        return ("-device", f"vhost-vsock-pci,guest-cid={cid},vhostfd={descriptors.vsock}")
    return (
        *("-chardev", f"socket,id=vsock,fd={descriptors.vsock}"),
        *("-device", "vhost-user-vsock-pci,chardev=vsock"),
    )


def _nic(spec: VmSpec) -> Sequence[str]:
    """Return the NIC that is there from the start, as hypervisor/qmp/devices.py would plug it in."""
    if spec.nic is None:
        return ()
    name = spec.nic.nic.id
    return (
        *("-netdev", f"tap,id=net-{name},fd={spec.nic.tap_fd}"),
        *("-device", f"virtio-net-pci,id=at0-{name},netdev=net-{name},mac={spec.nic.nic.mac},bus=port0,romfile="),
    )


def _queues(size: VmSize) -> int:
    """Return how many processors may speak to the disks at once: those that the VM may get are counted, a few of them."""
    return max(1, min(MOST_QUEUES, size.max_vcpus))


def _balloon() -> Sequence[str]:
    """Return the device through which a guest gives back what its programs have freed, by itself."""
    return ("-device", f"virtio-balloon-pci,id={BALLOON},free-page-reporting=on,deflate-on-oom=on")
