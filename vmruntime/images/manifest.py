"""Image indexes, manifests and configurations: untrusted JSON in, checked values out.

Formats: OCI image spec (image-index, manifest, config) and Docker's image manifest version 2, schema 2.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from vmruntime.errors import FailedPrecondition, NotFound, VmruntimeError
from vmruntime.images.platform import Platform
from vmruntime.images.reference import is_digest
from vmruntime.model.image import ImageConfig

# overlayfs stacks no more (OVL_MAX_STACK in the kernel's fs/overlayfs).
MAX_LAYERS = 500

_INDEX_TYPES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
_LAYER_PREFIXES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
)

T = TypeVar("T")


class _Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A pointer to a blob.

    Attributes:
        digest: "sha256:…", checked when the manifest is parsed.
        size: Bytes of the blob as the registry has it.
    """

    digest: str
    size: int
    media_type: str = ""
    platform: _Platform | None = None
    urls: list[str] | None = None


class Manifest(msgspec.Struct, frozen=True):
    """One platform's image: its configuration and its layers, lowest first."""

    config: Descriptor
    layers: list[Descriptor]


class Index(msgspec.Struct, frozen=True):
    """An image for several platforms."""

    manifests: list[Descriptor]


class Content(msgspec.Struct, frozen=True):
    """The part of an image configuration that vmruntime acts on; equal contents behave equally.

    Attributes:
        diff_ids: Digests of the uncompressed layers, lowest first.
    """

    diff_ids: list[str]
    config: ImageConfig


class _Envelope(msgspec.Struct, frozen=True, rename="camel"):
    """What tells the formats apart."""

    schema_version: int = 2
    media_type: str = ""
    manifests: list[Descriptor] | None = None
    layers: list[Descriptor] | None = None
    config: Descriptor | None = None
    fs_layers: object = None


class _RunConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """The `config` object; Docker writes null for what is empty."""

    user: str | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None
    volumes: dict[str, msgspec.Raw] | None = None
    stop_signal: str | None = None


class _RootFs(msgspec.Struct, frozen=True):
    type: str = "layers"
    diff_ids: list[str] | None = None


class _ConfigFile(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""
    config: _RunConfig | None = None
    rootfs: _RootFs | None = None


class BadImage(FailedPrecondition):
    """Raised when a registry or archive holds something that is not a usable image."""


def digest_of(data: bytes) -> str:
    """Return the SHA-256 digest by which content is addressed."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def parse_manifest(data: bytes, name: str) -> Manifest | Index:
    """Read what a registry answered for a manifest.

    Args:
        data: The bytes as they came.
        name: The reference, for messages.

    Raises:
        BadImage: It is malformed, of a retired format, or has layers that must not be distributed.
    """
    envelope = _decode(data, _Envelope, f"the manifest of {name}")
    if envelope.schema_version == 1 or envelope.fs_layers is not None:
        raise BadImage(
            f"{name} is in Docker's retired schema 1 format",
            remedy="push it again with a current tool, for example skopeo copy --format oci",
        )
    if envelope.schema_version != 2:
        raise BadImage(f"the manifest of {name} has the unknown schemaVersion {envelope.schema_version}")
    if envelope.manifests is not None and (envelope.layers is not None or envelope.config is not None):
        # Which of the two a reader sees would depend on the reader (CVE-2021-41190).
        raise BadImage(f"the manifest of {name} is an index and an image at once")
    if envelope.manifests is not None:
        _check_descriptors(envelope.manifests, name)
        return Index(envelope.manifests)
    if envelope.media_type in _INDEX_TYPES or envelope.config is None or envelope.layers is None:
        raise BadImage(f"the manifest of {name} lists no layers and no configuration")
    _check_descriptors([envelope.config, *envelope.layers], name)
    _check_layers(envelope.layers, name)
    return Manifest(envelope.config, envelope.layers)


def choose(index: Index, platform: Platform, name: str) -> Descriptor:
    """Return the manifest of an index for a platform, the best variant first.

    Raises:
        NotFound: The index has none; the message lists what it has.
    """
    fitting = [
        entry
        for entry in index.manifests
        if entry.platform and entry.platform.os == "linux" and entry.platform.architecture == platform.architecture
    ]
    for variant in platform.variants:
        for entry in fitting:
            if entry.platform and entry.platform.variant == variant:
                return entry
    offered = sorted({f"{e.platform.os}/{e.platform.architecture}" for e in index.manifests if e.platform})
    raise NotFound(f"{name} has no image for {platform}; it has: {', '.join(offered[:20]) or 'none'}")


def parse_config(data: bytes, name: str, platform: Platform, layer_count: int) -> Content:
    """Read an image configuration and check that this host can run it.

    Raises:
        BadImage: It is malformed, for another platform, or does not match its manifest.
    """
    file = _decode(data, _ConfigFile, f"the configuration of {name}")
    if file.os != "linux" or file.architecture != platform.architecture:
        found = f"{file.os or '(none)'}/{file.architecture or '(none)'}"
        raise BadImage(f"{name} is for the platform {found}; this host runs {platform}")
    diff_ids = (file.rootfs.diff_ids if file.rootfs else None) or []
    if len(diff_ids) != layer_count:
        raise BadImage(f"{name} has {layer_count} layers but its configuration lists {len(diff_ids)} diff_ids")
    for diff_id in diff_ids:
        if not is_digest(diff_id):
            raise BadImage(f"{name} has the diff_id {diff_id[:100]!r}, which is not a SHA-256 digest")
    return Content(diff_ids, _run_config(file.config or _RunConfig(), name))


def _run_config(raw: _RunConfig, name: str) -> ImageConfig:
    config = ImageConfig(
        entrypoint=raw.entrypoint or [],
        cmd=raw.cmd or [],
        env=raw.env or [],
        working_dir=raw.working_dir or "",
        user=raw.user or "",
        stop_signal=raw.stop_signal or "",
        labels=raw.labels or {},
        volumes=sorted(raw.volumes or {}),
    )
    words = [config.working_dir, config.user, config.stop_signal]
    words += [*config.entrypoint, *config.cmd, *config.env, *config.volumes]
    if any("\0" in word for word in words):
        raise BadImage(f"the configuration of {name} has a NUL character in what would become an argument")
    return config


def _check_descriptors(descriptors: list[Descriptor], name: str) -> None:
    for descriptor in descriptors:
        if not is_digest(descriptor.digest):
            raise BadImage(f"{name} has the digest {descriptor.digest[:100]!r}, which is not a SHA-256 digest")
        if not 0 <= descriptor.size < 2**62:
            raise BadImage(f"{name} has a blob of {descriptor.size} bytes")


def _check_layers(layers: list[Descriptor], name: str) -> None:
    if len(layers) > MAX_LAYERS:
        raise BadImage(f"{name} has {len(layers)} layers; overlayfs stacks at most {MAX_LAYERS}")
    for layer in layers:
        if "nondistributable" in layer.media_type or "foreign" in layer.media_type or layer.urls:
            raise BadImage(f"{name} has the layer {layer.digest}, which its maker does not let registries distribute")
        if not layer.media_type.startswith(_LAYER_PREFIXES):
            raise BadImage(f"{name} has a layer of the unknown type {layer.media_type[:100]!r}")
        if layer.media_type.endswith("+encrypted"):
            raise BadImage(f"{name} has the encrypted layer {layer.digest}")


def _decode(data: bytes, type_: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(what, error) from None


def _malformed(what: str, error: Exception) -> VmruntimeError:
    return BadImage(f"{what} is malformed: {str(error)[:300]}")
