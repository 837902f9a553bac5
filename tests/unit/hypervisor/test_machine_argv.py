"""QEMU's command line for machines that boot from their disk."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.hypervisor.devices import ARCHITECTURES
from vmruntime.hypervisor.disks import check_disks
from vmruntime.hypervisor.interface import Accelerator, Backing, Disk, FirmwareBoot, VmSpec
from vmruntime.hypervisor.qemu.argv import Descriptors, qemu_argv
from vmruntime.hypervisor.qemu.blockdev import OpenDisk, disk_blockdev, disk_device
from vmruntime.hypervisor.qemu.machine_argv import PORTS, MachineDescriptors
from vmruntime.model.image_pod import DiskDriver, Firmware
from vmruntime.model.resources import VmSize

UUID = "8a2b1c52-0000-4000-8000-0123456789ab"
ROOT = Disk(
    path=Path("/pod/root.qcow2"),
    serial="root",
    readonly=False,
    format="qcow2",
    backing=Backing(path=Path("/images/debian.vmdk"), format="vmdk"),
    driver=DiskDriver.VIRTIO,
)
SEED = Disk(path=Path("/pod/seed.iso"), serial="seed", readonly=True, cdrom=True)
DISKS = [ROOT, SEED]


def argv(boot: FirmwareBoot | None = None, architecture: str = "x86_64", **fds: int) -> list[str]:
    spec = VmSpec(
        id="a" * 64,
        size=VmSize(vcpus=2, memory_mib=300),
        boot=boot or FirmwareBoot(name="web-0", uuid=UUID),
        directory=Path("/run/x"),
        cid=0,
        disks=DISKS,
    )
    machine = MachineDescriptors(log=20, agent=21, **fds)
    disks = [OpenDisk(fd=6, backing=7), OpenDisk(fd=8, block_device=True)]
    descriptors = Descriptors(qmp=3, console=4, vsock=None, vsock_native=False, disks=disks, machine=machine)
    assert {3, 4, 6, 7, 8, 20, 21, *fds.values()} == set(descriptors.all())
    return qemu_argv("qemu", ARCHITECTURES[architecture], Accelerator.TCG, spec, descriptors)


def after(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == option]


def parsed(arguments: list[str], option: str) -> list[dict[str, Any]]:
    return [msgspec.json.decode(value) for value in after(arguments, option) if value.startswith("{")]


def test_it_is_started_paused_and_stays_when_the_guest_has_ended() -> None:
    arguments = argv()
    assert "-S" in arguments
    assert "-no-reboot" not in arguments
    assert after(arguments, "-action") == ["shutdown=pause,panic=pause"]
    assert "pvpanic-pci" in after(arguments, "-device")


def test_it_is_told_who_it_is() -> None:
    arguments = argv(FirmwareBoot(name="web-0", uuid=UUID, oem_strings=["io.systemd.credential:a=b,c", "d"]))
    assert after(arguments, "-uuid") == [UUID]
    assert after(arguments, "-name") == ["guest=web-0,debug-threads=on"]
    assert after(arguments, "-smbios") == ["type=11,value=io.systemd.credential:a=b,,c", "type=11,value=d"]


def test_every_descriptor_set_is_another_one() -> None:
    boot = FirmwareBoot(name="x", uuid=UUID, firmware=Firmware.UEFI, variables=Path("/vars"))
    assert after(argv(boot, code=30, variables=31), "-add-fd") == [
        "fd=20,set=3",
        "fd=30,set=4",
        "fd=31,set=5",
        "fd=6,set=0,opaque=root",
        "fd=7,set=2,opaque=backing of root",
        "fd=8,set=1,opaque=seed",
    ]


def test_no_path_is_opened() -> None:
    text = " ".join(argv())
    assert "/pod" not in text
    assert "/images" not in text
    assert "socket,id=console,fd=4,server=on,wait=off,logfile=/dev/fdset/3,logappend=on" in after(argv(), "-chardev")


def test_an_overlay_has_the_backing_it_is_given_and_nothing_else() -> None:
    (root, seed) = parsed(argv(), "-blockdev")
    assert (root["driver"], root["discard"], root["read-only"]) == ("qcow2", "unmap", False)
    assert (root["backing"]["driver"], root["backing"]["backing"]) == ("vmdk", None)
    assert root["backing"]["file"] == {
        "driver": "file",
        "filename": "/dev/fdset/2",
        "read-only": True,
        "locking": "off",
        "aio": "threads",
    }
    assert seed["file"]["driver"] == "host_device"
    assert "backing" not in seed
    alone = Disk(path=Path("/x"), serial="x", readonly=True, format="qcow2")
    assert disk_blockdev(alone, 4)["backing"] is None


def test_the_first_disk_is_booted_from_and_no_other() -> None:
    assert after(argv(), "-boot") == ["strict=on"]
    assert parsed(argv(), "-device") == [
        {"driver": "virtio-blk-pci", "drive": "d-root", "id": "dev-d-root", "serial": "root", "bootindex": 1},
        {"driver": "scsi-cd", "bus": "scsi0.0", "drive": "d-seed", "id": "dev-d-seed", "serial": "seed"},
    ]


def test_a_virtio_disk_is_plugged_into_a_port() -> None:
    device = disk_device(ROOT, port=3)
    assert (device["bus"], device["id"]) == ("port3", "at3-dev-d-root")


def test_what_the_guest_sees_of_a_disk_can_be_less_than_there_is() -> None:
    disk = Disk(path=Path("/x"), serial="x", readonly=False, size=1 << 20)
    assert disk_blockdev(disk, 0)["size"] == 1 << 20


def test_ports_share_a_slot() -> None:
    ports = [value for value in after(argv(), "-device") if value.startswith("pcie-root-port")]
    assert len(ports) == PORTS
    assert ports[0] == "pcie-root-port,id=port0,chassis=1,addr=0x1c.0x0,multifunction=on"
    assert ports[7] == "pcie-root-port,id=port7,chassis=8,addr=0x1c.0x7"


def test_no_vsock_without_a_context_id() -> None:
    assert "vsock" not in " ".join(argv())


def test_a_screen_only_when_asked_for() -> None:
    assert "-vnc" not in argv()
    assert after(argv(), "-machine")[0].endswith(",graphics=off,memory-backend=ram,mem-merge=off")
    arguments = argv(FirmwareBoot(name="x", uuid=UUID, vnc=True))
    assert after(arguments, "-vnc") == ["unix:/run/x/helpers/vnc.sock"]
    assert {"VGA", "usb-tablet,bus=usb.0"} <= set(after(arguments, "-device"))
    assert "graphics=off" not in " ".join(arguments)


def test_a_tpm_on_a_connection() -> None:
    arguments = argv(FirmwareBoot(name="x", uuid=UUID, tpm=Path("/tpm/ctrl")), tpm=40)
    assert "socket,id=swtpm,fd=40" in after(arguments, "-chardev")
    assert "tpm-crb,tpmdev=tpm" in after(arguments, "-device")
    assert "tpm-tis-device,tpmdev=tpm" in after(
        argv(FirmwareBoot(name="x", uuid=UUID, firmware=Firmware.UEFI), "aarch64", tpm=40, code=1, variables=2),
        "-device",
    )


def test_uefi_is_two_flash_chips() -> None:
    boot = FirmwareBoot(name="x", uuid=UUID, firmware=Firmware.UEFI, variables=Path("/vars"))
    arguments = argv(boot, code=30, variables=31)
    assert "pflash0=code,pflash1=variables" in after(arguments, "-machine")[0]
    code, variables = parsed(arguments, "-blockdev")[:2]
    assert (code["read-only"], variables["read-only"]) == (True, False)
    with pytest.raises(InvalidArgument, match="variables"):
        argv(FirmwareBoot(name="x", uuid=UUID, firmware=Firmware.UEFI), code=30)


def test_there_is_no_bios_on_arm() -> None:
    with pytest.raises(FailedPrecondition, match="firmware 'bios'"):
        argv(architecture="aarch64")


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        ({"serial": "a,b"}, "serial: 'a,b'"),
        ({"serial": "x" * 37}, "serial"),
        ({"format": "raw"}, "backing: '/images/debian.vmdk'"),
        ({"size": 512}, "size: 512"),
        ({"backing": None, "format": "raw", "size": 1000}, "size: 1000"),
        ({"cdrom": True}, "readonly: False"),
    ],
)
def test_disks_that_contradict_themselves(disk: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_disks([msgspec.structs.replace(ROOT, **disk)])


def test_virtio_disks_that_the_guest_could_not_tell_apart() -> None:
    first, second = (msgspec.structs.replace(ROOT, serial="x" * 20 + end) for end in "ab")
    check_disks([first], present=["x" * 19])
    with pytest.raises(InvalidArgument, match="looks like"):
        check_disks([first, second])
    with pytest.raises(InvalidArgument, match="looks like"):
        check_disks([second], present=[first.serial])
    check_disks([msgspec.structs.replace(one, driver=DiskDriver.SCSI) for one in (first, second)])
