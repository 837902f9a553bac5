"""What an image is, once pulled."""

from __future__ import annotations

from typing import Literal

import msgspec


def layer_serial(diff_id: str) -> str:
    """Return the disk serial of a layer: 32 hex digits of its diffID.

    QEMU passes on at most 36 characters of a SCSI serial (VPD page 0x80, SPC-4).
    """
    return diff_id.removeprefix("sha256:")[:32]


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer on this host's disk, ready for a VM.

    Attributes:
        diff_id: "sha256:…" of the uncompressed tar (OCI image spec); names the file.
        size: Bytes of the EROFS file.
    """

    diff_id: str
    size: int

    @property
    def serial(self) -> str:
        """The disk serial under which a guest finds the layer."""
        return layer_serial(self.diff_id)


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The part of an OCI image configuration that running it needs.

    Attributes:
        env: "NAME=value" strings.
        user: As in the image: user, user:group, by id or name; empty: root.
        stop_signal: Name or number as given; empty: SIGTERM.
    """

    entrypoint: list[str] = []
    cmd: list[str] = []
    env: list[str] = []
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    labels: dict[str, str] = {}
    volumes: list[str] = []


class DiskImage(msgspec.Struct, frozen=True, kw_only=True):
    """The disk of a VM image on this host, checked.

    Attributes:
        digest: "sha256:…" that names the file: of its content, or of the containerDisk's layer that it came in.
        virtual_size: Bytes that a guest sees.
        file_size: Bytes of the file.
    """

    digest: str
    format: Literal["qcow2", "raw", "vmdk"]
    virtual_size: int
    file_size: int


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """One image as the store keeps it.

    Attributes:
        id: "sha256:…" of the configuration blob, as every runtime names images.
        repo_tags: Full names, docker.io/library/busybox:1.
        repo_digests: Full names with digest, docker.io/library/busybox@sha256:….
        layers: Lowest first.
        size: Bytes the image's layers take on disk.
        created_at: Nanoseconds since the epoch, of the first pull.
        last_used_at: The same of the last pull, or of the last container's creation or removal.
        pinned: No clean-up may take it.
        disk: Of a VM image; an image by URL has this and no layers, a containerDisk both; None: not one, or not known yet.
    """

    id: str
    repo_tags: list[str] = []
    repo_digests: list[str] = []
    layers: list[Layer]
    config: ImageConfig
    size: int
    created_at: int
    last_used_at: int = 0
    pinned: bool = False
    disk: DiskImage | None = None


class ImageUse(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an image is needed.

    Attributes:
        in_use: A container has it now, running or not, as its root file system or as a volume.
    """

    image: Image
    in_use: bool


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What a clean-up removed, or would.

    Attributes:
        freed_bytes: Of layers that nothing else has.
    """

    images: list[Image]
    freed_bytes: int


class RegistryAuth(msgspec.Struct, frozen=True, kw_only=True):
    """Credentials of one pull (CRI's AuthConfig). Never stored; its repr shows nothing."""

    username: str = ""
    password: str = ""
    auth: str = ""
    identity_token: str = ""
    registry_token: str = ""
    server_address: str = ""

    def __repr__(self) -> str:
        return "RegistryAuth(…)"
