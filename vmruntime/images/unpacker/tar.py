"""A tar archive read as a stream: ustar, pax and GNU's, as builders of images and GNU tar write them.

Formats: POSIX.1-2017 (pax), "Tar Internals" of GNU tar's manual, tar(5) of libarchive.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator

from vmruntime.images.unpacker import fields, sparse
from vmruntime.images.unpacker.problems import BadLayer, shown
from vmruntime.images.unpacker.sparse import Segments

BLOCK = 512
# What Go's reader, which builders and other runtimes use, allows a header that is longer than a block.
HEADER_LIMIT = 1024 * 1024

HARD_LINK = 0
"""The kind of a member that is another name of an earlier one; the others are stat.S_IF…."""

# name, mode, uid, gid, size, mtime, checksum, type, link, magic and version, (names of owners,) major, minor, prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_ZEROS = bytes(BLOCK)
_KINDS = {
    b"\0": stat.S_IFREG,
    b"0": stat.S_IFREG,
    b"7": stat.S_IFREG,
    b"S": stat.S_IFREG,
    b"1": HARD_LINK,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}
_XATTR = b"SCHILY.xattr."
_NO_ID = 2**32 - 1  # chown(2): "leave it"


class Member:
    """One entry of the archive.

    Attributes:
        path, link: As the archive has them.
        kind: stat.S_IF… or HARD_LINK.
        mode: Permissions alone.
        mtime, mtime_ns: Seconds since the epoch, and nanoseconds to add.
        size: Bytes of the file, holes included; 0 of everything but regular files.
        major, minor: Of device nodes.
        xattrs: By full name, whatever the archive gives.
    """

    __slots__ = ("gid", "kind", "link", "major", "minor", "mode", "mtime", "mtime_ns", "path", "size", "uid", "xattrs")

    def __init__(self, header: tuple[bytes, ...], records: dict[bytes, bytes], path: bytes, link: bytes) -> None:
        """Take what the header and its extended records say.

        Raises:
            BadLayer: It is not what a file can have.
        """
        _, mode, uid, gid, _, mtime, _, kind, _, _, major, minor, _ = header
        self.path = records.get(b"path", path) if records else path
        self.link = records.get(b"linkpath", link) if records else link
        if kind not in _KINDS:
            raise BadLayer(f"cannot be unpacked: {shown(self.path)} is of the unknown type {shown(kind)}")
        self.kind = _KINDS[kind]
        if self.kind == stat.S_IFREG and kind != b"S" and self.path.endswith(b"/"):
            self.kind = stat.S_IFDIR  # as the first tars wrote directories
        self.mode = fields.number(mode, "mode") & 0o7777
        self.uid, self.gid = fields.number(uid, "uid"), fields.number(gid, "gid")
        self.mtime, self.mtime_ns = fields.number(mtime, "time", signed=True), 0
        self.size = 0
        self.major = self.minor = 0
        if self.kind in (stat.S_IFCHR, stat.S_IFBLK):
            self.major, self.minor = fields.number(major, "device"), fields.number(minor, "device")
        self.xattrs: dict[bytes, bytes] = {}
        if records:
            self._extend(records)
        if self.uid >= _NO_ID or self.gid >= _NO_ID:
            raise BadLayer(f"cannot be unpacked: {shown(self.path)} belongs to {self.uid}:{self.gid}, out of range")

    def _extend(self, records: dict[bytes, bytes]) -> None:
        if value := records.get(b"uid"):
            self.uid = fields.decimal(value, "uid")
        if value := records.get(b"gid"):
            self.gid = fields.decimal(value, "gid")
        if value := records.get(b"mtime"):
            self.mtime, self.mtime_ns = fields.time(value)
        for key, value in records.items():
            if key.startswith(_XATTR) and value:
                self.xattrs[key[len(_XATTR) :]] = value


class Source:
    """Bytes that come in chunks, in the pieces that are asked for."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._chunk = b""
        self._at = 0

    def block(self) -> bytes:
        """Return the next block; empty at the end.

        Raises:
            BadLayer: It ends in the middle of one.
        """
        end = self._at + BLOCK
        if end <= len(self._chunk):
            block = self._chunk[self._at : end]
            self._at = end
            return block
        return self.read(BLOCK) if self._more() else b""

    def read(self, size: int) -> bytes:
        """Return so many bytes.

        Raises:
            BadLayer: There are fewer.
        """
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        """Yield so many bytes, uncopied.

        Raises:
            BadLayer: There are fewer.
        """
        while size > 0:
            if not self._more():
                raise BadLayer("is corrupt: its tar ends in the middle")
            piece = memoryview(self._chunk)[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> None:
        """Pass over so many bytes.

        Raises:
            BadLayer: There are fewer.
        """
        if self._at + size <= len(self._chunk):
            self._at += size
            return
        for _ in self.pieces(size):
            pass

    def drain(self) -> None:
        """Read to the end."""
        while self._more():
            self._at = len(self._chunk)

    def _more(self) -> bool:
        while self._at == len(self._chunk):
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._chunk, self._at = chunk, 0
        return True


class Tar:
    """Iterates over the members; `content` gives what is in the one that came last."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0  # bytes up to the next header
        self._stored = 0
        self._size = 0
        self._segments: Segments | None = None

    def __iter__(self) -> Iterator[Member]:
        """Yield the members up to the archive's end; what follows it is not read.

        Raises:
            BadLayer: It is no tar, or has what must not be.
        """
        defaults: dict[bytes, bytes] = {}
        extended: dict[bytes, bytes] = {}
        long: dict[bytes, bytes] = {}
        while (block := self._source.block()) and block != _ZEROS:
            header = _HEADER.unpack(block)
            fields.check(block, header[6])
            size, kind = fields.number(header[4], "size"), header[7]
            if kind in (b"x", b"X"):
                extended = fields.records(self._long_header(size))
            elif kind == b"g":
                defaults |= fields.records(self._long_header(size))
            elif kind in (b"L", b"K"):
                long[kind] = fields.text(self._long_header(size))
            elif kind == b"V":  # GNU's name for the archive as a whole
                self._source.skip(size + -size % BLOCK)
            else:
                yield self._member(block, header, size, {**defaults, **extended}, long)
                self._source.skip(self._left)
                extended, long = {}, {}

    def content(self) -> Iterator[memoryview | int]:
        """Yield a regular file's bytes, and the lengths of holes as numbers; to be read to the end, or not at all.

        Raises:
            BadLayer: The archive ends in the middle.
        """
        self._left -= self._stored
        if self._segments is None:
            return self._source.pieces(self._stored)
        return sparse.expand(self._segments, self._size, self._source.pieces)

    def _long_header(self, size: int) -> bytes:
        if size > HEADER_LIMIT:
            raise BadLayer(f"cannot be unpacked: its tar has a header of {size} bytes, more than {HEADER_LIMIT}")
        data = self._source.read(size)
        self._source.skip(-size % BLOCK)
        return data

    def _member(
        self, block: bytes, header: tuple[bytes, ...], size: int, records: dict[bytes, bytes], long: dict[bytes, bytes]
    ) -> Member:
        path = long.get(b"L") or _path(block, header)
        member = Member(header, records, path, long.get(b"K") or fields.text(header[8]))
        self._left = self._stored = self._size = 0
        self._segments = None
        if member.kind == stat.S_IFREG:  # of the others, the size says nothing (POSIX: directories, Go: all)
            if value := records.get(b"size"):
                size = fields.decimal(value, "size")
            self._stored = self._size = size
            self._left = size + -size % BLOCK
            if header[7] == b"S" or any(key.startswith(b"GNU.sparse.") for key in records):
                self._read_map(member, block, records)
            member.size = self._size
        return member

    def _read_map(self, member: Member, block: bytes, records: dict[bytes, bytes]) -> None:
        """Find out where the content of a sparse file belongs."""
        member.path = records.get(b"GNU.sparse.name", member.path)
        size = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size") or b"%d" % self._size
        self._size = fields.decimal(size, "size")
        if block[156:157] == b"S":
            self._segments, self._size = sparse.of_header(block, lambda: self._source.read(BLOCK))
        elif records.get(b"GNU.sparse.major") == b"1":
            self._segments = sparse.of_content(self._map_block)
        elif b"GNU.sparse.map" in records:
            self._segments = sparse.of_record(records[b"GNU.sparse.map"])
        else:
            raise BadLayer(f"cannot be unpacked: {shown(member.path)} is sparse in an unknown way")
        sparse.check(self._segments, self._size, self._stored)

    def _map_block(self) -> bytes:
        """Return the next block of a member's content, which a map takes up."""
        if self._stored < BLOCK:
            raise BadLayer("is corrupt: its tar has a sparse file whose map is longer than its content")
        self._stored -= BLOCK
        self._left -= BLOCK
        return self._source.read(BLOCK)


def _path(block: bytes, header: tuple[bytes, ...]) -> bytes:
    """Return the name in a header, with what comes before it in those of POSIX and of star."""
    name = fields.text(header[0])
    if header[9][:6] == b"ustar\0":
        prefix = header[12][:131] if block[508:512] == b"tar\0" else header[12]
        if prefix[0]:
            return fields.text(prefix) + b"/" + name
    return name
