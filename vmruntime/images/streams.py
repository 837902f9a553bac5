"""A layer's bytes: decompressed, measured and hashed as they pass."""

from __future__ import annotations

import enum
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

from vmruntime.aio.pipeline import output_of
from vmruntime.errors import Internal, ResourceExhausted
from vmruntime.images.manifest import BadImage

# Small enough that carrying on after a gzip member's end (eStargz has one a file) copies little.
_READ = 64 * 1024
_CHUNK = 1024 * 1024


class Compression(enum.Enum):
    """How a blob is packed, by its first bytes: media types are known to lie."""

    NONE = b""
    GZIP = b"\x1f\x8b"
    ZSTD = b"\x28\xb5\x2f\xfd"
    BZIP2 = b"BZh"
    XZ = b"\xfd7zXZ\x00"


def detect(head: bytes) -> Compression:
    """Return the compression of a blob that begins so."""
    for kind in Compression:
        if kind.value and head.startswith(kind.value):
            return kind
    return Compression.NONE


class CheckedTar:
    """Iterates over the uncompressed tar of a blob; the iteration fails at its end when the digest is wrong.

    Attributes:
        size: Bytes so far.
    """

    def __init__(self, blob: Path, diff_id: str, limit: int) -> None:
        """Read nothing yet.

        Args:
            blob: The layer as the registry has it.
            diff_id: The digest that the uncompressed bytes must have.
            limit: Most uncompressed bytes.
        """
        self._blob = blob
        self._diff_id = diff_id
        self._limit = limit
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        """Yield chunks of up to 1 MiB.

        Raises:
            BadImage: The blob cannot be decompressed, or is not what the configuration says.
            ResourceExhausted: It is larger than the limit.
        """
        digest = hashlib.sha256()
        for chunk in _decompressed(self._blob):
            self.size += len(chunk)
            if self.size > self._limit:
                raise ResourceExhausted(
                    f"layer {self._diff_id} unpacks to more than {self._limit} bytes",
                    remedy="raise images.max_layer_gib if the image is to be trusted",
                )
            digest.update(chunk)
            yield chunk
        found = f"sha256:{digest.hexdigest()}"
        if found != self._diff_id:
            raise BadImage(f"a layer is corrupt: it unpacks to {found}, its image says {self._diff_id}")


def _decompressed(blob: Path) -> Iterator[bytes]:
    with open(blob, "rb") as file:
        kind = detect(file.read(8))
    match kind:
        case Compression.NONE:
            return _plain(blob)
        case Compression.GZIP:
            return _gunzip(blob)
        case Compression.ZSTD:
            return _unzstd(blob)
        case _:
            raise BadImage(f"a layer is compressed with {kind.name.lower()}; images use gzip, zstd or nothing")


def _plain(blob: Path) -> Iterator[bytes]:
    with open(blob, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _gunzip(blob: Path) -> Iterator[bytes]:
    """Decompress all members of a gzip file, never holding more than one chunk of output."""
    with open(blob, "rb") as file:
        member = zlib.decompressobj(wbits=31)
        data = file.read(_READ)
        while data:
            try:
                chunk = member.decompress(data, _CHUNK)
            except zlib.error as error:
                raise BadImage(f"a layer is corrupt: {error}") from None
            if chunk:
                yield chunk
            if member.eof:
                # Padding after the last member is zeros (tar to a block device); anything else is a new member.
                data = member.unused_data.lstrip(b"\0") or file.read(_READ).lstrip(b"\0")
                member = zlib.decompressobj(wbits=31) if data else member
            else:
                data = member.unconsumed_tail or file.read(_READ)
        if not member.eof:
            raise BadImage("a layer is corrupt: it ends in the middle of its gzip stream")


def _unzstd(blob: Path) -> Iterator[bytes]:
    # zstd's own default refuses windows above 128 MiB, which bounds its memory.
    try:
        yield from output_of(["zstd", "--decompress", "--stdout", "--quiet"], blob, _CHUNK)
    except Internal as error:
        raise BadImage(f"a layer is corrupt: {error.message}") from None
