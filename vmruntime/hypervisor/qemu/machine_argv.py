"""The part of QEMU's command line that differs between a kernel of ours and a machine that boots from its disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.hypervisor.devices import Architecture
from vmruntime.hypervisor.interface import Accelerator, FirmwareBoot, VmSpec
from vmruntime.hypervisor.qemu.blockdev import flash_blockdev
from vmruntime.hypervisor.qemu.cpu import cpu_argument, smp_argument
from vmruntime.model.image_pod import Firmware

PORTS = 8
"""For NICs, the share, more memory, virtio-blk disks, and the vsock of a guest that was frozen without one."""

BALLOON = "balloon"
# One slot has room for eight functions: the other slots stay free for disks.
PORTS_SLOT = "0x1c"


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What differs.

    Attributes:
        console: More options of the console's character device.
        ending: What QEMU does at the guest's end.
        boot: What starts, and devices that only one kind has.
    """

    name: str
    machine: str
    cpu: str
    smp: str
    ending: Sequence[str]
    console: str = ""
    boot: Sequence[str]
    ports: Sequence[str]


class MachineDescriptors(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine that boots from its disk inherits, by number.

    Attributes:
        log: The console's file, to be appended to.
        agent: A listening unix socket for the QEMU guest agent's channel.
        tpm: A connection to a swtpm's control socket.
        code, variables: UEFI's flash chips.
    """

    log: int
    agent: int
    tpm: int | None = None
    code: int | None = None
    variables: int | None = None

    def all(self) -> list[int]:
        """Return every descriptor."""
        return [fd for fd in (self.log, self.agent, self.tpm, self.code, self.variables) if fd is not None]


def machine_parts(
    spec: VmSpec,
    boot: FirmwareBoot,
    architecture: Architecture,
    accelerator: Accelerator,
    descriptors: MachineDescriptors,
    screen: Path,
) -> Parts:
    """Return the parts of a machine that boots from its disk.

    Args:
        spec: The VM.
        boot: Its boot.
        architecture: The host's.
        accelerator: How it runs.
        descriptors: What it inherits.
        screen: Where its VNC server is to listen, if it has one.

    Raises:
        FailedPrecondition: There is no such machine.
        InvalidArgument: A field cannot be used.
    """
    log, code, variables = _fdsets(spec)
    return Parts(
        name=_escaped(boot.name),
        machine=_machine(boot, architecture),
        cpu=cpu_argument(boot.cpu, architecture, accelerator),
        smp=smp_argument(spec.size, boot.cpu),
        # Powered off or panicked, QEMU stays and holds the guest still, so that a daemon that was away learns of it.
        ending=("-S", "-action", "shutdown=pause,panic=pause"),
        console=f",logfile=/dev/fdset/{log},logappend=on",
        boot=[
            *("-boot", "strict=on", "-uuid", boot.uuid),
            *(argument for text in boot.oem_strings for argument in ("-smbios", f"type=11,value={_escaped(text)}")),
            *("-add-fd", f"fd={descriptors.log},set={log}"),
            *_flash(boot, descriptors, code, variables),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,fd={descriptors.agent},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            *("-device", f"virtio-balloon-pci,id={BALLOON}"),
            *("-device", architecture.panic_device),
            *_tpm(descriptors.tpm, architecture),
            *_screen(boot, architecture, screen),
        ],
        ports=root_ports(),
    )


def _fdsets(spec: VmSpec) -> tuple[int, int, int]:
    """Return free descriptor sets: disks have theirs, and those of what is below them, from 0 on."""
    first = len(spec.disks) + sum(disk.backing is not None for disk in spec.disks)
    return first, first + 1, first + 2


def _machine(boot: FirmwareBoot, architecture: Architecture) -> str:
    machine = architecture.firmware_machine
    if boot.firmware is Firmware.UEFI:
        machine += ",pflash0=code,pflash1=variables"
    elif not architecture.bios:
        raise FailedPrecondition(
            f"firmware 'bios': machines of {architecture.qemu} have none", remedy="choose the firmware uefi"
        )
    # Without a screen, SeaBIOS speaks on the serial console: it says there why it cannot boot.
    return machine if boot.vnc else f"{machine},graphics=off"


def _flash(boot: FirmwareBoot, descriptors: MachineDescriptors, code: int, variables: int) -> Sequence[str]:
    if boot.firmware is not Firmware.UEFI:
        return ()
    if descriptors.code is None or descriptors.variables is None:
        raise InvalidArgument.field("variables", None, "is given, but firmware is 'uefi'")
    return (
        *("-add-fd", f"fd={descriptors.code},set={code}", "-add-fd", f"fd={descriptors.variables},set={variables}"),
        *("-blockdev", msgspec.json.encode(flash_blockdev("code", code, readonly=True)).decode()),
        *("-blockdev", msgspec.json.encode(flash_blockdev("variables", variables, readonly=False)).decode()),
    )


def _tpm(descriptor: int | None, architecture: Architecture) -> Sequence[str]:
    if descriptor is None:
        return ()
    return (
        *("-chardev", f"socket,id=swtpm,fd={descriptor}", "-tpmdev", "emulator,id=tpm,chardev=swtpm"),
        *("-device", f"{architecture.tpm_device},tpmdev=tpm"),
    )


def _screen(boot: FirmwareBoot, architecture: Architecture, path: Path) -> Sequence[str]:
    if not boot.vnc:
        return ()
    devices = (architecture.screen_device, "qemu-xhci,id=usb", "usb-kbd,bus=usb.0", "usb-tablet,bus=usb.0")
    return ("-vnc", f"unix:{_escaped(str(path))}", *(word for name in devices for word in ("-device", name)))


def root_ports() -> list[str]:
    """Return ports that devices are hot-plugged into; PCIe has no hot-plug on the root bus itself."""
    return [
        argument
        for port in range(PORTS)
        for argument in (
            "-device",
            f"pcie-root-port,id=port{port},chassis={port + 1},addr={PORTS_SLOT}.{port:#x}"
            + (",multifunction=on" if port == 0 else ""),
        )
    ]


def _escaped(text: str) -> str:
    """Return an option's value; QEMU ends it at a single comma."""
    return text.replace(",", ",,")
