from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest

from vmruntime.errors import InvalidArgument
from vmruntime.hypervisor.devices import ARCHITECTURES
from vmruntime.hypervisor.interface import Accelerator, Backing, Disk, FirmwareBoot, KernelBoot, VmSpec
from vmruntime.hypervisor.libvirt.domain import METADATA_NAMESPACE, QEMU_NAMESPACE, Machine, domain_xml
from vmruntime.model.image_pod import (
    CpuCache,
    CpuFeature,
    CpuModel,
    CpuSetting,
    CpuTopology,
    DiskDriver,
    Firmware,
)
from vmruntime.model.resources import VmSize

DIRECTORY = Path("/run/vm")
ROOT = Disk(
    path=Path("/pods/root.qcow2"),
    serial="root",
    readonly=False,
    format="qcow2",
    backing=Backing(path=Path("/images/base.vmdk"), format="vmdk"),
)
SEED = Disk(path=Path("/pods/seed.iso"), serial="seed", readonly=True, cdrom=True)
FIRMWARE = FirmwareBoot(name="ns-pod-12345678", uuid="11111111-2222-3333-4444-555555555555")
KERNEL = KernelBoot(kernel=Path("/guest/vmlinuz"), initramfs=Path("/guest/initrd"), arguments="x=<1>")


def domain(
    boot: FirmwareBoot | KernelBoot = FIRMWARE,
    *disks: Disk,
    size: VmSize | None = None,
    cid: int = 0,
    accelerator: Accelerator = Accelerator.TCG,
    security: list[str] | None = None,
    vsock_native: bool = False,
    loader: Path | None = None,
    native: list[Disk] | None = None,
) -> ET.Element:
    spec = VmSpec(
        id="ab" * 32,
        size=size or VmSize(vcpus=2, memory_mib=256),
        boot=boot,
        directory=DIRECTORY,
        cid=cid,
        disks=list(disks),
    )
    text = domain_xml(
        Machine(
            spec=spec,
            uuid=FIRMWARE.uuid,
            name=FIRMWARE.name,
            disks=list(disks) if native is None else native,
            architecture=ARCHITECTURES["x86_64"],
            accelerator=accelerator,
            emulator="/usr/bin/qemu-system-x86_64",
            owner="/var/lib/vmruntime",
            uid=999,
            gid=995,
            security=security or [],
            loader=loader,
            vsock_native=vsock_native,
        )
    )
    return ET.fromstring(text)


def element(parent: ET.Element, path: str) -> ET.Element:
    found = parent.find(path)
    assert found is not None, f"no {path} in {ET.tostring(parent, encoding='unicode')}"
    return found


def arguments(parent: ET.Element) -> list[str]:
    return [arg.attrib["value"] for arg in parent.iterfind(f"{{{QEMU_NAMESPACE}}}commandline/{{{QEMU_NAMESPACE}}}arg")]


def text(parent: ET.Element) -> str:
    return ET.tostring(parent, encoding="unicode").strip()


def test_people_and_later_daemons_recognise_it() -> None:
    found = domain()
    assert found.findtext("name") == "ns-pod-12345678"
    assert found.findtext("uuid") == FIRMWARE.uuid
    assert found.findtext("title") == "vmruntime pod ababababababa"
    mark = element(found, f"metadata/{{{METADATA_NAMESPACE}}}machine")
    assert mark.attrib == {"pod": "ab" * 32, "owner": "/var/lib/vmruntime"}


def test_qemu_has_its_own_account_and_no_file_changes_its_owner() -> None:
    label = element(domain(security=["apparmor"]), "seclabel")
    assert label.attrib == {"type": "static", "model": "dac", "relabel": "no"}
    assert label.findtext("label") == "+999:+995"
    other = domain(security=["apparmor"]).findall("seclabel")[1]
    assert other.attrib == {"type": "none", "model": "apparmor"}


@pytest.mark.parametrize(("accelerator", "kind"), [(Accelerator.KVM, "kvm"), (Accelerator.TCG, "qemu")])
def test_the_accelerator_is_the_domains_type(accelerator: Accelerator, kind: str) -> None:
    assert domain(accelerator=accelerator).get("type") == kind


def test_a_panicked_machine_stays_for_a_later_daemon_to_see() -> None:
    found = domain()
    assert [found.findtext(f"on_{event}") for event in ("poweroff", "reboot", "crash")] == [
        "destroy",
        "restart",
        "preserve",
    ]
    found = domain(KERNEL)
    assert {found.findtext(f"on_{event}") for event in ("poweroff", "reboot", "crash")} == {"destroy"}


def test_no_other_disk_is_booted_from_when_the_first_is_plugged_in_later() -> None:
    volume = Disk(path=Path("/dev/vg/root"), serial="root", readonly=False)
    (seed,) = domain(FIRMWARE, volume, SEED, native=[SEED]).findall("devices/disk")
    assert (seed.findtext("serial"), seed.find("boot")) == ("seed", None)


def test_disks_are_descriptors_and_their_chains_end_where_we_say() -> None:
    found = domain(FIRMWARE, ROOT, SEED).findall("devices/disk")
    assert text(found[0]) == (
        '<disk type="file" device="disk"><driver name="qemu" type="qcow2" discard="unmap" />'
        '<source file="/pods/root.qcow2" fdgroup="disk0" />'
        '<backingStore type="file"><format type="vmdk" /><source file="/images/base.vmdk" fdgroup="backing0" />'
        '<backingStore /></backingStore><target dev="sda" bus="scsi" /><serial>root</serial><boot order="1" /></disk>'
    )
    assert text(found[1]) == (
        '<disk type="file" device="cdrom"><driver name="qemu" type="raw" />'
        '<source file="/pods/seed.iso" fdgroup="disk1" /><backingStore /><target dev="sdb" bus="scsi" />'
        "<readonly /><serial>seed</serial></disk>"
    )


def test_a_virtio_disk_shows_only_so_much_of_its_file() -> None:
    disk = Disk(path=Path("/v.img"), serial="v", readonly=True, driver=DiskDriver.VIRTIO, size=1 << 20)
    found = element(domain(FIRMWARE, ROOT, disk), "devices/disk[2]")
    assert element(found, "target").attrib == {"dev": "vda", "bus": "virtio"}
    assert element(found, "source/slices/slice").attrib == {"type": "storage", "offset": "0", "size": "1048576"}
    assert element(found, "driver").get("discard") is None


def test_many_disks_have_names_of_their_own() -> None:
    disks = [Disk(path=Path(f"/{n}"), serial=str(n), readonly=True, cdrom=n % 2 == 0) for n in range(60)]
    names = [target.get("dev") for target in domain(FIRMWARE, *disks).iterfind("devices/disk/target")]
    assert len(set(names)) == 60
    assert names[25:28] == ["sdz", "sdaa", "sdab"]


def test_a_kernel_of_ours_is_not_libvirts_business() -> None:
    """It would give the files to the VM's account, and they are everybody's."""
    found = domain(KERNEL)
    assert found.find("os/kernel") is None
    given = arguments(found)
    assert given[given.index("-kernel") + 1] == "/guest/vmlinuz"
    assert given[given.index("-initrd") + 1] == "/guest/initrd"
    assert given[given.index("-append") + 1].endswith("x=<1>")
    assert "pvpanic" not in " ".join(given)


def test_ports_stay_free_for_what_is_plugged_in_by_qmp() -> None:
    for boot, wanted in ((KERNEL, 8), (FIRMWARE, 8)):
        ports = [argument for argument in arguments(domain(boot)) if argument.startswith("pcie-root-port,")]
        ids = [port.split(",")[1] for port in ports]
        assert ids == [*(f"id=port{number}" for number in range(wanted)), "id=port-vsock"]
        assert len({port.split("addr=")[1].split(",")[0] for port in ports}) == len(ports)
        assert len({port.split("chassis=")[1].split(",")[0] for port in ports}) == len(ports)


def test_uefi_has_its_code_and_a_copy_of_its_variables() -> None:
    boot = msgspec.structs.replace(FIRMWARE, firmware=Firmware.UEFI, variables=Path("/pods/vars.fd"))
    found = element(domain(boot, loader=Path("/ovmf/code.fd")), "os")
    loader = element(found, "loader")
    assert loader.attrib == {"readonly": "yes", "type": "pflash"}
    assert (loader.text, found.findtext("nvram")) == ("/ovmf/code.fd", "/pods/vars.fd")


def test_uefi_without_variables_is_refused() -> None:
    boot = msgspec.structs.replace(FIRMWARE, firmware=Firmware.UEFI)
    with pytest.raises(InvalidArgument, match="variables"):
        domain(boot, loader=Path("/ovmf/code.fd"))


def test_what_a_machine_has_when_asked_for() -> None:
    boot = msgspec.structs.replace(FIRMWARE, oem_strings=["a=<&>", "b"], tpm=Path("/t,.sock"), vnc=True)
    found = domain(boot)
    assert [entry.text for entry in found.iterfind("sysinfo/oemStrings/entry")] == ["a=<&>", "b"]
    assert element(found, "os/smbios").get("mode") == "sysinfo"
    assert "socket,id=swtpm,path=/t,,.sock" in arguments(found)
    assert element(found, "devices/graphics").attrib == {"type": "vnc", "socket": "/run/vm/helpers/vnc.sock"}
    assert element(found, "devices/memballoon").get("model") == "virtio"
    assert "pvpanic-pci,bus=pcie.0,addr=0x1d" in arguments(found)
    plain = domain()
    for path in ("sysinfo", "os/smbios", "devices/graphics", "devices/video", "devices/vsock"):
        assert plain.find(path) is None


def test_what_xml_cannot_say_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"'\\x1b'"):
        domain(msgspec.structs.replace(FIRMWARE, oem_strings=["a\x1bb"]))


def test_vsock_of_the_kernel_is_libvirts() -> None:
    assert element(domain(cid=7, vsock_native=True), "devices/vsock/cid").attrib == {"auto": "no", "address": "7"}
    assert domain(cid=7).find("devices/vsock") is None  # plugged in by QMP


def test_room_to_grow() -> None:
    found = domain(KERNEL, size=VmSize(vcpus=1, memory_mib=128, max_vcpus=3, max_memory_mib=600))
    vcpu = element(found, "vcpu")
    assert (vcpu.text, vcpu.get("current")) == ("3", "1")
    assert found.findtext("maxMemory") == str(128 + 384)
    assert found.findtext("memory") == "128"
    cell = element(found, "cpu/numa/cell")
    assert (cell.get("memory"), cell.get("cpus"), cell.get("memAccess")) == ("128", "0-2", "shared")
    assert domain(KERNEL).find("maxMemory") is None


@pytest.mark.parametrize(
    ("boot", "accelerator", "mode"),
    [
        (KERNEL, Accelerator.KVM, "host-passthrough"),
        (KERNEL, Accelerator.TCG, "maximum"),
        (FIRMWARE, Accelerator.KVM, "maximum"),
        (FIRMWARE, Accelerator.TCG, "maximum"),
        (msgspec.structs.replace(FIRMWARE, host_cpu=True), Accelerator.KVM, "host-passthrough"),
        (msgspec.structs.replace(FIRMWARE, host_cpu=True), Accelerator.TCG, "maximum"),
    ],
)
def test_the_cpu_without_a_setting(boot: FirmwareBoot | KernelBoot, accelerator: Accelerator, mode: str) -> None:
    assert element(domain(boot, accelerator=accelerator), "cpu").get("mode") == mode


def test_every_field_of_a_cpu_setting() -> None:
    setting = CpuSetting(
        mode="custom",
        match="exact",
        check="partial",
        migratable="on",
        model=CpuModel(value="Skylake-Server", fallback="forbid", vendor_id="AuthenticAMD"),
        vendor="Intel",
        topology=CpuTopology(cores=2),
        cache=CpuCache(mode="emulate", level=3),
        features=[CpuFeature(name="vmx", policy="require"), CpuFeature(name="avx")],
    )
    found = element(domain(msgspec.structs.replace(FIRMWARE, cpu=setting), accelerator=Accelerator.KVM), "cpu")
    assert text(found) == (
        '<cpu mode="custom" match="exact" check="partial" migratable="on">'
        '<model fallback="forbid" vendor_id="AuthenticAMD">Skylake-Server</model><vendor>Intel</vendor>'
        '<topology sockets="1" dies="1" cores="2" threads="1" /><cache mode="emulate" level="3" />'
        '<feature name="vmx" policy="require" /><feature name="avx" /></cpu>'
    )


def test_a_cpu_setting_that_says_little() -> None:
    found = element(domain(msgspec.structs.replace(FIRMWARE, cpu=CpuSetting(cache=CpuCache(mode="disable")))), "cpu")
    assert text(found) == '<cpu><cache mode="disable" /></cpu>'
