"""A domain's XML, as a pure function of the VM that it describes (libvirt.org/formatdomain.html).

QEMU opens no path of ours but kernel, initramfs, UEFI's variables (libvirt passes no descriptor of them) and the sockets of
TPM and VNC: disks are descriptors (fdgroup), and what libvirt has no words for is plugged in by QMP before the guest runs.
"""

from __future__ import annotations

import re
import string
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec

from vmruntime.errors import InvalidArgument
from vmruntime.hypervisor.devices import Architecture
from vmruntime.hypervisor.helpers import SCREEN_SOCKET
from vmruntime.hypervisor.interface import Accelerator, Backing, Disk, FirmwareBoot, KernelBoot, VmSpec
from vmruntime.hypervisor.libvirt.cpu import cpu
from vmruntime.hypervisor.qemu.argv import MEMORY_BLOCK_MIB, kernel_command_line
from vmruntime.hypervisor.qemu.balloon import POLL_SECONDS
from vmruntime.hypervisor.qemu.machine_argv import PORTS
from vmruntime.hypervisor.vsock import helper_directory
from vmruntime.model.image_pod import DiskDriver, Firmware

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
METADATA_NAMESPACE = "https://vmruntime.io/xmlns/libvirt/1"
METADATA_PREFIX = "vmruntime"
# Where libvirt puts nothing: it fills slots from 1 on, and 31 is the chipset's.
PORTS_SLOT, PANIC_SLOT, VSOCK_SLOT = 30, 29, 28
VSOCK_PORT = "port-vsock"
CONSOLE = "charserial0"
BALLOON = "balloon0"
_SCREENS = {"VGA": "vga", "virtio-gpu-pci": "virtio"}
_UNSAYABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a domain is made from.

    Attributes:
        uuid, name: The domain's.
        disks: Those that libvirt shall know, each read and written by the descriptors of disk_group().
        owner: Whose it is: a directory that one daemon has for itself.
        uid, gid: What QEMU runs as.
        security: The host's security models beside DAC, such as apparmor: they know nothing of descriptors passed by QMP.
        loader: UEFI's code; None with BIOS.
        vsock_native: The kernel has vhost-vsock.
    """

    spec: VmSpec
    uuid: str
    name: str
    disks: list[Disk]
    architecture: Architecture
    accelerator: Accelerator
    emulator: str
    owner: str
    uid: int
    gid: int
    security: list[str] = []
    loader: Path | None = None
    vsock_native: bool = False


def domain_xml(machine: Machine) -> str:
    """Return the domain's XML."""
    ET.register_namespace("qemu", QEMU_NAMESPACE)
    ET.register_namespace(METADATA_PREFIX, METADATA_NAMESPACE)
    spec, boot = machine.spec, machine.spec.boot
    domain = ET.Element("domain", type="kvm" if machine.accelerator is Accelerator.KVM else "qemu")
    _text(domain, "name", machine.name)
    _text(domain, "uuid", machine.uuid)
    _text(domain, "title", f"vmruntime pod {spec.id[:13]}")
    mark = {"pod": spec.id, "owner": machine.owner}
    ET.SubElement(ET.SubElement(domain, "metadata"), f"{{{METADATA_NAMESPACE}}}machine", mark)
    _memory(domain, machine)
    _text(domain, "vcpu", str(max(spec.size.vcpus, spec.size.max_vcpus)), current=str(spec.size.vcpus))
    if isinstance(boot, FirmwareBoot) and boot.oem_strings:
        strings = ET.SubElement(ET.SubElement(domain, "sysinfo", type="smbios"), "oemStrings")
        for entry in boot.oem_strings:
            _text(strings, "entry", entry)
    _os(domain, machine)
    features = ET.SubElement(domain, "features")
    for name in ("acpi", "apic"):
        ET.SubElement(features, name)
    ET.SubElement(features, "vmport", state="off")
    domain.append(cpu(boot, machine.accelerator, spec.size))
    ET.SubElement(domain, "clock", offset="utc")
    _endings(domain, boot)
    _devices(domain, machine)
    label = ET.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
    _text(label, "label", f"+{machine.uid}:+{machine.gid}")
    for model in machine.security:
        ET.SubElement(domain, "seclabel", type="none", model=model)
    _arguments(domain, machine)
    return ET.tostring(domain, encoding="unicode")


def disk_group(number: int) -> str:
    """Return the name that the descriptors of one disk of Machine.disks are passed under."""
    return f"disk{number}"


def backing_group(number: int) -> str:
    """Return the name that the descriptor of its backing image is passed under."""
    return f"backing{number}"


def _memory(domain: ET.Element, machine: Machine) -> None:
    size = machine.spec.size
    growth = max(0, size.max_memory_mib - size.memory_mib) // MEMORY_BLOCK_MIB * MEMORY_BLOCK_MIB
    if growth:
        _text(domain, "maxMemory", str(size.memory_mib + growth), slots="1", unit="MiB")
    _text(domain, "memory", str(size.memory_mib), unit="MiB")
    # vhost-user backends (vhost-device-vsock, virtiofsd) map the guest's memory.
    backing = ET.SubElement(domain, "memoryBacking")
    ET.SubElement(backing, "nosharepages")
    ET.SubElement(backing, "source", type="memfd")
    ET.SubElement(backing, "access", mode="shared")


def _os(domain: ET.Element, machine: Machine) -> None:
    boot = machine.spec.boot
    element = ET.SubElement(domain, "os")
    arch = machine.architecture.qemu.removeprefix("qemu-system-")
    _text(element, "type", "hvm", arch=arch, machine=machine.architecture.machine.partition(",")[0])
    if isinstance(boot, KernelBoot):
        return  # by QEMU's arguments: libvirt would take the ownership of the files that all VMs share
    if boot.firmware is Firmware.UEFI:
        if boot.variables is None:
            raise InvalidArgument.field("variables", None, "is given, but firmware is 'uefi'")
        _text(element, "loader", str(machine.loader), readonly="yes", type="pflash")
        _text(element, "nvram", str(boot.variables))
    if boot.oem_strings:
        ET.SubElement(element, "smbios", mode="sysinfo")


def _endings(domain: ET.Element, boot: KernelBoot | FirmwareBoot) -> None:
    """A panicked guest stays, so that its end is known as such also to a daemon that was not there; we end it."""
    firmware = isinstance(boot, FirmwareBoot)
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart" if firmware else "destroy")
    _text(domain, "on_crash", "preserve" if firmware else "destroy")


def _devices(domain: ET.Element, machine: Machine) -> None:
    spec, boot = machine.spec, machine.spec.boot
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", machine.emulator)
    _disks(devices, machine.disks, boot=spec.disks[0] if spec.disks else None)
    ET.SubElement(devices, "controller", type="scsi", index="0", model="virtio-scsi")
    screen = isinstance(boot, FirmwareBoot) and boot.vnc
    ET.SubElement(devices, "controller", type="usb", index="0", model="qemu-xhci" if screen else "none")
    serial = ET.SubElement(devices, "serial", type="unix")
    ET.SubElement(serial, "source", mode="bind", path=str(spec.directory / "console.sock"))
    rng = ET.SubElement(devices, "rng", model="virtio")
    ET.SubElement(rng, "backend", model="builtin")
    if spec.cid and machine.vsock_native:
        ET.SubElement(ET.SubElement(devices, "vsock", model="virtio"), "cid", auto="no", address=str(spec.cid))
    if not isinstance(boot, FirmwareBoot):
        ET.SubElement(devices, "memballoon", model="none")
        return
    ET.SubElement(devices, "controller", type="virtio-serial", index="0")
    balloon = ET.SubElement(devices, "memballoon", model="virtio")
    ET.SubElement(balloon, "stats", period=str(POLL_SECONDS))
    if boot.vnc:
        ET.SubElement(devices, "graphics", type="vnc", socket=str(helper_directory(spec.directory) / SCREEN_SOCKET))
        ET.SubElement(ET.SubElement(devices, "video"), "model", type=_SCREENS[machine.architecture.screen_device])
        for kind in ("keyboard", "tablet"):
            ET.SubElement(devices, "input", type=kind, bus="usb")


def _disks(devices: ET.Element, disks: list[Disk], *, boot: Disk | None) -> None:
    names = {"sd": iter(_names("sd")), "vd": iter(_names("vd"))}
    for number, disk in enumerate(disks):
        bus = "virtio" if disk.driver is DiskDriver.VIRTIO and not disk.cdrom else "scsi"
        element = ET.SubElement(devices, "disk", type="file", device="cdrom" if disk.cdrom else "disk")
        driver = ET.SubElement(element, "driver", name="qemu", type=disk.format)
        if not disk.readonly:
            driver.set("discard", "unmap")  # freed blocks go back to the host's file system
        source = ET.SubElement(element, "source", file=str(disk.path), fdgroup=disk_group(number))
        if disk.size:
            slices = ET.SubElement(source, "slices")
            ET.SubElement(slices, "slice", type="storage", offset="0", size=str(disk.size))
        _backing(element, disk.backing, number)
        ET.SubElement(element, "target", dev=next(names["vd" if bus == "virtio" else "sd"]), bus=bus)
        if disk.readonly:
            ET.SubElement(element, "readonly")
        _text(element, "serial", disk.serial)
        if disk == boot:
            ET.SubElement(element, "boot", order="1")


def _backing(parent: ET.Element, backing: Backing | None, number: int) -> None:
    """End the chain where we know it ends, so that nobody looks into the images for more."""
    if backing is None:
        ET.SubElement(parent, "backingStore")
        return
    element = ET.SubElement(parent, "backingStore", type="file")
    ET.SubElement(element, "format", type=backing.format)
    ET.SubElement(element, "source", file=str(backing.path), fdgroup=backing_group(number))
    ET.SubElement(element, "backingStore")


def _names(prefix: str) -> list[str]:
    letters = string.ascii_lowercase
    return [prefix + a for a in letters] + [prefix + a + b for a in letters for b in letters]


def _arguments(domain: ET.Element, machine: Machine) -> None:
    """Add what libvirt must not know: a kernel that is everybody's, and ports that it must not fill."""
    boot = machine.spec.boot
    arguments: list[str] = []
    if isinstance(boot, KernelBoot):
        command_line = kernel_command_line(machine.architecture, boot.arguments)
        arguments += ["-kernel", str(boot.kernel), "-initrd", str(boot.initramfs), "-append", command_line]
    else:
        if boot.tpm is not None:
            # libvirt wants swtpm_setup for its own backend, though not for one that runs already.
            backend = f"socket,id=swtpm,path={_escaped(str(boot.tpm))}"
            arguments += ["-chardev", backend, "-tpmdev", "emulator,id=tpm,chardev=swtpm"]
            arguments += ["-device", f"{machine.architecture.tpm_device},tpmdev=tpm"]
        # libvirt 9.0 has the ISA device alone.
        arguments += ["-device", f"{machine.architecture.panic_device},bus=pcie.0,addr={PANIC_SLOT:#x}"]
    places = {f"port{number}": f"{PORTS_SLOT:#x}.{number:#x}" for number in range(PORTS)}
    for number, (name, place) in enumerate({**places, VSOCK_PORT: f"{VSOCK_SLOT:#x}.0x0"}.items()):
        # Chassis numbers tell ports apart; libvirt counts from 1.
        port = f"pcie-root-port,id={name},bus=pcie.0,addr={place},chassis={100 + number}"
        arguments += ["-device", port + (",multifunction=on" if number == 0 else "")]
    element = ET.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    for argument in arguments:
        ET.SubElement(element, f"{{{QEMU_NAMESPACE}}}arg", value=_sayable(argument))


def _escaped(text: str) -> str:
    """Return an option's value; QEMU ends it at a single comma."""
    return text.replace(",", ",,")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = _sayable(text)
    return element


def _sayable(text: str) -> str:
    """Return a text that XML 1.0 can have.

    Raises:
        InvalidArgument: It has a character that XML has no way to write.
    """
    if (found := _UNSAYABLE.search(text)) is not None:
        raise InvalidArgument(f"{text!r} has the character {found[0]!r}, which libvirt cannot be told")
    return text
