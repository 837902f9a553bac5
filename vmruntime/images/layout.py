"""The OCI image layout that skopeo fills for us (OCI image spec, image-layout)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from vmruntime.errors import Internal
from vmruntime.images import manifest as manifests
from vmruntime.images.manifest import Content, Index, Manifest
from vmruntime.images.platform import Platform

# Configurations and manifests are at most this long; see skopeo.MANIFEST_LIMIT.
_JSON_LIMIT = 4 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Scan:
    """What has arrived.

    Attributes:
        complete: Digests of whole blobs among those expected.
        bytes: Of these and of blobs still arriving.
    """

    complete: set[str]
    bytes: int


class Layout:
    """A directory with blobs named by digest. All methods block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"

    def blob(self, digest: str) -> Path:
        """Return where a blob is, or will be."""
        return self._blobs / digest.removeprefix("sha256:")

    def prepare(self, present: Mapping[str, int]) -> None:
        """Create the layout with sparse stand-ins, of the right size, for blobs that are not to be fetched.

        skopeo asks the layout "have you this digest?" before it downloads and does not read what is there.
        """
        self._blobs.mkdir(parents=True)
        for digest, size in present.items():
            with open(self.blob(digest), "xb") as file:
                file.truncate(size)

    def scan(self, expected: Mapping[str, int]) -> Scan:
        """Look for the expected blobs; skopeo renames a blob to its digest once it is complete and checked."""
        complete: set[str] = set()
        total = 0
        for digest in expected:
            size = _size(self.blob(digest))
            if size is not None:
                complete.add(digest)
                total += size
        with os.scandir(self.directory) as entries:
            total += sum(_size(Path(entry)) or 0 for entry in entries if entry.name.startswith("oci-put-blob"))
        return Scan(complete, total)

    def read(self, name: str, platform: Platform) -> tuple[Manifest, Content]:
        """Return the one image in the finished layout.

        Args:
            name: For messages.
            platform: What the image has to be for.

        Raises:
            BadImage: See manifest.
            Internal: skopeo left something else than a layout of one image.
        """
        index = manifests.parse_manifest(_read(self.directory / "index.json"), name)
        if not isinstance(index, Index) or len(index.manifests) != 1:
            raise Internal(f"skopeo left no layout of one image for {name}")
        manifest = manifests.parse_manifest(self._content(index.manifests[0].digest), name)
        if not isinstance(manifest, Manifest):
            raise Internal(f"skopeo left an index where {name} should be")
        config = self._content(manifest.config.digest)
        return manifest, manifests.parse_config(config, name, platform, len(manifest.layers))

    def _content(self, digest: str) -> bytes:
        return _read(self.blob(digest))


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_JSON_LIMIT + 1)
    except OSError as error:
        raise Internal(f"skopeo left {path.name} unreadable: {error}") from error
    if len(data) > _JSON_LIMIT:
        raise Internal(f"{path.name} is longer than {_JSON_LIMIT} bytes")
    return data


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
