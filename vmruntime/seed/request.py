"""What a seed is made of."""

from __future__ import annotations

import msgspec

from vmruntime.model.image_pod import ImagePod
from vmruntime.model.sandbox import Dns, PodNetwork

SourceContent = dict[str, bytes]
"""A ConfigMap's or Secret's keys and values, as kubelet mounts them: no longer in base64."""


class SeedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file to write in the guest.

    Attributes:
        path: Absolute.
        mode: Permission bits.
        covered: Written where a mount is to cover it: for a guest that cannot make that mount.
    """

    path: str
    content: bytes
    mode: int = 0o644
    covered: bool = False


class SeedMount(msgspec.Struct, frozen=True, kw_only=True):
    """A mount to make in the guest, at every boot.

    Attributes:
        source: A device, or the tag of a virtio-fs share.
        path: Absolute; made if it is not there.
        options: Of mount(8). nofail: a guest that lacks it still boots.
    """

    source: str
    path: str
    fstype: str = "auto"
    options: str = "defaults,nofail"


class SeedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A block volume: a name in the guest for a device that has another.

    Attributes:
        path: volumeDevices' devicePath, such as /dev/testpvc.
        source: What does not change with the order of disks, such as /dev/disk/by-id/virtio-SERIAL.
    """

    path: str
    source: str


class SeedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a guest is told.

    Attributes:
        instance_id: cloud-init does again what it does once per instance when this changes.
        image_pod: The pod's annotations.
        ssh_keys, user_data, files: What image_pod's sources hold; None: there is no such source.
        network: None: the guest asks by DHCP.
        dns: The pod's; where it names no server, CNI's counts.
        envs: (name, value) in order.
        injected: Files besides those of image_pod.files_source.
    """

    instance_id: str
    hostname: str
    image_pod: ImagePod = ImagePod()
    ssh_keys: SourceContent | None = None
    user_data: SourceContent | None = None
    files: SourceContent | None = None
    network: PodNetwork | None = None
    dns: Dns = Dns()
    envs: list[tuple[str, str]] = []
    injected: list[SeedFile] = []
    mounts: list[SeedMount] = []
    devices: list[SeedDevice] = []
