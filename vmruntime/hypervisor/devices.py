"""What differs between host architectures, as a table."""

from __future__ import annotations

import os

import msgspec

from vmruntime.errors import FailedPrecondition


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """How a VM looks on one architecture.

    Attributes:
        machine: QEMU machine type with its options.
        serial: The kernel's name of the first serial port.
        cpu: QEMU CPU model by accelerator name.
        firmware_machine: As `machine`, for one that boots from its disk.
        bios: It can be started by SeaBIOS.
        panic_device, tpm_device, screen_device: QEMU's devices for these.
        extra: More QEMU arguments.
    """

    qemu: str
    machine: str
    serial: str
    cpu: dict[str, str]
    firmware_machine: str
    bios: bool
    tpm_device: str
    screen_device: str
    panic_device: str = "pvpanic-pci"
    extra: list[str] = []


ARCHITECTURES: dict[str, Architecture] = {
    "x86_64": Architecture(
        qemu="qemu-system-x86_64",
        # smm and vmport serve firmware and VMware tools; a pod's kernel needs neither.
        machine="q35,smm=off,vmport=off,usb=off,sata=off,graphics=off",
        serial="ttyS0",
        # 5-level paging makes every page walk of an emulated CPU longer and helps no pod.
        cpu={"kvm": "host", "tcg": "max,la57=off"},
        firmware_machine="q35,smm=off,vmport=off,usb=off,sata=off",
        bios=True,
        tpm_device="tpm-crb",
        screen_device="VGA",
    ),
    "aarch64": Architecture(
        qemu="qemu-system-aarch64",
        machine="virt,gic-version=max,usb=off",
        serial="ttyAMA0",
        cpu={"kvm": "host", "tcg": "max"},
        firmware_machine="virt,gic-version=max,usb=off",
        bios=False,
        tpm_device="tpm-tis-device",
        screen_device="virtio-gpu-pci",
    ),
}


def host_architecture() -> Architecture:
    """Return the table's row for this machine.

    Raises:
        FailedPrecondition: vmruntime does not know the architecture.
    """
    machine = os.uname().machine
    try:
        return ARCHITECTURES[machine]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise FailedPrecondition(f"no VMs on {machine}: known architectures are {known}") from None
