"""A layer's bytes: decompressed, measured and hashed as they pass."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import queue
import threading
import zlib
from collections.abc import Generator, Iterable, Iterator
from typing import BinaryIO

from vmruntime.images.unpacker.problems import BadLayer, TooLarge

# Small enough that carrying on after a gzip member's end (eStargz has one a file) copies little.
_READ = 64 * 1024
# A few of these fit into a processor's cache.
_CHUNK = 256 * 1024
_AHEAD = 8


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

    def __init__(self, blob: BinaryIO, diff_id: str, limit: int) -> None:
        """Read nothing yet.

        Args:
            blob: The layer as the registry has it; a file, at its beginning.
            diff_id: The digest that the uncompressed bytes must have.
            limit: Most uncompressed bytes.
        """
        self._blob = blob
        self._diff_id = diff_id
        self._limit = limit
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        """Yield chunks; they are decompressed in a thread, ahead of the reader.

        Raises:
            BadLayer: The blob cannot be decompressed, or is not what the configuration says.
            TooLarge: It is larger than the limit.
        """
        digest = hashlib.sha256()
        with contextlib.closing(ahead(_decompressed(self._blob), _AHEAD)) as chunks:
            for chunk in chunks:
                self.size += len(chunk)
                if self.size > self._limit:
                    raise TooLarge(f"unpacks to more than {self._limit} bytes")
                digest.update(chunk)
                yield chunk
        found = f"sha256:{digest.hexdigest()}"
        if found != self._diff_id:
            raise BadLayer(f"is corrupt: it unpacks to {found}, its image says {self._diff_id}")


def ahead(chunks: Iterable[bytes], depth: int) -> Generator[bytes, None, None]:
    """Yield what an iterator gives, which runs in a thread and is up to `depth` items ahead; its errors are raised here."""
    ready: queue.Queue[bytes | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            for chunk in chunks:
                ready.put(chunk)
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(0.01)


def _decompressed(blob: BinaryIO) -> Iterator[bytes]:
    kind = detect(blob.read(8))
    blob.seek(0)
    match kind:
        case Compression.NONE:
            return iter(lambda: blob.read(_CHUNK), b"")
        case Compression.GZIP:
            return _gunzip(blob)
        case Compression.ZSTD:
            return _unzstd(blob)
        case _:
            raise BadLayer(f"is compressed with {kind.name.lower()}; images use gzip, zstd or nothing")


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    """Decompress all members of a gzip file, never holding more than one chunk of output."""
    member = zlib.decompressobj(wbits=31)
    data = file.read(_READ)
    while data:
        try:
            chunk = member.decompress(data, _CHUNK)
        except zlib.error as error:
            raise BadLayer(f"is corrupt: {error}") from None
        if chunk:
            yield chunk
        if member.eof:
            # Padding after the last member is zeros (tar to a block device); anything else is a new member.
            data = member.unused_data.lstrip(b"\0") or file.read(_READ).lstrip(b"\0")
            member = zlib.decompressobj(wbits=31) if data else member
        else:
            data = member.unconsumed_tail or file.read(_READ)
    if not member.eof:
        raise BadLayer("is corrupt: it ends in the middle of its gzip stream")


def _unzstd(blob: BinaryIO) -> Iterator[bytes]:
    # Loaded for those layers alone: they are few, and it takes longer to load than all the rest.
    from vmruntime.aio.pipeline import output_of
    from vmruntime.errors import Internal

    # zstd's own default refuses windows above 128 MiB, which bounds its memory.
    try:
        yield from output_of(["zstd", "--decompress", "--stdout", "--quiet"], blob, _CHUNK)
    except Internal as error:
        raise BadLayer(f"is corrupt: {error.message}") from None
