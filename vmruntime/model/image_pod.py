"""What a pod of kind image asks for beyond CRI: its machine, its disks and its cloud-init data."""

from __future__ import annotations

import enum
from typing import Any, Literal

import msgspec


class DiskDriver(enum.Enum):
    """How the guest sees its disks: virtio-scsi or virtio-blk."""

    SCSI = "scsi"
    VIRTIO = "virtio"


class Firmware(enum.Enum):
    """What starts the boot loader: SeaBIOS or OVMF."""

    BIOS = "bios"
    UEFI = "uefi"


class SeedFormat(enum.Enum):
    """The data source of cloud-init that a seed is for."""

    NOCLOUD = "nocloud"
    CONFIGDRIVE = "configdrive"


class SourceKind(enum.Enum):
    """The Kubernetes object that data come from."""

    CONFIGMAP = "configmap"
    SECRET = "secret"


class Encoding(enum.Enum):
    """How a value in a ConfigMap or Secret is written."""

    PLAIN = "plain"
    BASE64 = "base64"


class DataSource(msgspec.Struct, frozen=True, kw_only=True):
    """A ConfigMap or Secret of the pod's namespace; an empty key: the whole of it, or the usual key."""

    kind: SourceKind
    name: str
    key: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.kind.value, self.name, self.key) if part)


def _joined(name: str) -> str:
    """Name a field as in libvirt's Go structures, in lower case: vendor_id is VendorID there."""
    return name.replace("_", "")


class CpuModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_joined):
    """libvirt's <model fallback vendor_id>value</model>."""

    value: str = ""
    fallback: Literal["", "allow", "forbid"] = ""
    vendor_id: str = ""


class CpuTopology(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """libvirt's <topology>; 0 is 1."""

    sockets: int = 0
    dies: int = 0
    cores: int = 0
    threads: int = 0

    @property
    def vcpus(self) -> int:
        """How many virtual CPUs it is a topology of."""
        return (self.sockets or 1) * (self.dies or 1) * (self.cores or 1) * (self.threads or 1)


class CpuCache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """libvirt's <cache>."""

    mode: Literal["emulate", "passthrough", "disable"]
    level: int | None = None


class CpuFeature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """libvirt's <feature>."""

    name: str
    policy: Literal["", "force", "require", "optional", "disable", "forbid"] = ""


class CpuSetting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """libvirt's <cpu> element (libvirt.org/formatdomain.html); empty: not given."""

    mode: Literal["", "custom", "host-model", "host-passthrough", "maximum"] = ""
    match: Literal["", "minimum", "exact", "strict"] = ""
    check: Literal["", "none", "partial", "full"] = ""
    migratable: Literal["", "on", "off"] = ""
    model: CpuModel | None = None
    vendor: str = ""
    topology: CpuTopology | None = None
    cache: CpuCache | None = None
    features: list[CpuFeature] = []


class ImagePod(msgspec.Struct, frozen=True, kw_only=True):
    """What the annotations of an image pod say.

    Attributes:
        vcpus: 0: as the pod's CPU limits say.
        host_cpu: The guest's CPU is like the host's, which makes nested virtualisation possible.
        cpu: Replaces `host_cpu`.
        root_volume_size: Bytes; 0, or less than the image has: the image's size.
        system_uuid: The machine's, lower case with hyphens; empty: chosen by the hypervisor.
        vnc: A VNC server for the screen, on a unix socket.
        ssh_keys: Lines of authorized_keys(5).
        ssh_key_source: More of them; an empty key means authorized_keys.
        meta_data: Members added to cloud-init's meta-data, or replacing its own.
        user_data: cloud-config; None: not given.
        user_data_overwrite: Where the annotation says something, its source does not count.
        user_data_script: The whole of user-data; empty: not given.
        user_data_source: Every key of it is a member of cloud-config, or, with a key, the value of that key is the
            whole of user-data, written in `user_data_encoding`.
        files_source: Files for the guest: keys NAME, NAME_path, NAME_encoding.
        force_dhcp: The guest has its addresses by DHCP rather than from cloud-init's network-config.
        chown_mounts: The owner of everything on shared directories becomes the guest's root.
    """

    vcpus: int = 0
    host_cpu: bool = False
    cpu: CpuSetting | None = None
    disk_driver: DiskDriver = DiskDriver.SCSI
    root_volume_size: int = 0
    system_uuid: str = ""
    firmware: Firmware = Firmware.BIOS
    tpm: bool = False
    vnc: bool = False
    ssh_keys: list[str] = []
    ssh_key_source: DataSource | None = None
    seed_format: SeedFormat = SeedFormat.NOCLOUD
    meta_data: dict[str, Any] = {}
    user_data: dict[str, Any] | None = None
    user_data_overwrite: bool = False
    user_data_script: str = ""
    user_data_source: DataSource | None = None
    user_data_encoding: Encoding = Encoding.PLAIN
    files_source: DataSource | None = None
    force_dhcp: bool = False
    chown_mounts: bool = False
