"""An EROFS image, written from front to back while a layer comes in; nothing in it is compressed.

    block 0      the superblock and the root directory's inode
    blocks 1…    content of files by whole blocks, and between it, about every MiB, the inodes of files that came before
    last         content of directories, then their inodes

What of a file's or directory's content does not fill a block is behind its inode, where there is room in the inode's block.

Format: the kernel's Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator

from vmruntime.images.unpacker.problems import BadLayer
from vmruntime.images.unpacker.tree import Directory, Node

BLOCK = 4096
_MAGIC = 0xE0F5E1E2
_SUPER_OFFSET = 1024
_HAS_MTIME = 2  # EROFS_FEATURE_COMPAT_MTIME
# magic, checksum, compatible features, log2(BLOCK), slots, root nid, inodes, time, its ns, blocks, first block of inodes, of
# shared attributes, uuid, name, incompatible features and what belongs to them
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sI44x")
# format, attributes, mode, size, block or device, number, uid, gid, mtime, its ns, names
_INODE = struct.Struct("<HHHxxQIIIIqII16x")
_DIRENT = struct.Struct("<QHBx")
_XATTR = struct.Struct("<BBH")
_XATTRS_HEADER = bytes(12)
_EXTENDED = 1  # of an inode's format: 64 bytes
_TAIL_BEHIND = 2 << 1  # EROFS_INODE_FLAT_INLINE
_NAMES_OFFSET = 44
_SLOT = 32  # inodes are numbered by these
_ROOT_AT = _SUPER_OFFSET + _SUPER.size
_ROOT_NID = _ROOT_AT // _SLOT

_XATTR_PREFIXES = {b"user.": 1, b"trusted.": 4, b"security.": 6}
_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFLNK: 7,
}
_MAX_MAJOR, _MAX_MINOR = 2**12 - 1, 2**20 - 1

# How much is collected before it is written: inodes with what is behind them, and content.
_INODES_AT_ONCE = 1024 * 1024
_WRITE_AT_ONCE = 1024 * 1024
_BUFFERS_AT_ONCE = 512

_Place = tuple[Directory, Directory]
"""A directory and its parent."""


class _Output:
    """A file that is written to its end, with holes."""

    def __init__(self, descriptor: int, position: int) -> None:
        self._descriptor = descriptor
        self._buffers: list[bytes | memoryview] = []
        self._waiting = 0
        self._written = position

    @property
    def position(self) -> int:
        return self._written + self._waiting

    def write(self, data: bytes | memoryview) -> None:
        self._buffers.append(data)
        self._waiting += len(data)
        if self._waiting >= _WRITE_AT_ONCE or len(self._buffers) >= _BUFFERS_AT_ONCE:
            self.flush()

    def hole(self, size: int) -> None:
        self.flush()
        self._written += size

    def align(self) -> None:
        if gap := -self.position % BLOCK:
            self.write(bytes(gap))

    def flush(self) -> None:
        while self._buffers:
            done = os.pwritev(self._descriptor, self._buffers, self._written)
            self._written += done
            self._waiting -= done
            while self._buffers and done >= len(self._buffers[0]):
                done -= len(self._buffers.pop(0))
            if done:
                self._buffers[0] = memoryview(self._buffers[0])[done:]


class Image:
    """The image while it is made."""

    def __init__(self, descriptor: int) -> None:
        """Begin with an empty file."""
        self._descriptor = descriptor
        self._output = _Output(descriptor, BLOCK)
        self._pending: list[tuple[Node, bytes]] = []
        self._pending_size = 0
        self._inodes = 0

    def add_file(self, node: Node, content: Iterable[memoryview | int]) -> None:
        """Write a regular file.

        Args:
            node: Has its size.
            content: So many bytes, in pieces; a number stands for a hole.

        Raises:
            OSError: See write(2).
        """
        node.block = self._output.position // BLOCK
        whole = node.size - node.size % BLOCK
        tail: list[bytes | memoryview] = []
        for piece in content:
            if isinstance(piece, int):
                head = min(piece, whole)
                self._output.hole(head)
                tail.append(bytes(piece - head))
            else:
                head = min(len(piece), whole)
                self._output.write(piece[:head])
                tail.append(piece[head:])
            whole -= head
        self._queue(node, b"".join(tail))

    def add(self, node: Node) -> None:
        """Write what has no content but a target or a device number.

        Raises:
            BadLayer: The link is empty or too long, or Linux has no such device.
        """
        major, minor = node.device
        if major > _MAX_MAJOR or minor > _MAX_MINOR:
            raise BadLayer(f"cannot be unpacked: it has the device {major}:{minor}, which Linux has not")
        node.block = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
        if stat.S_ISLNK(node.mode):
            if not 0 < len(node.target) < BLOCK or b"\0" in node.target:
                raise BadLayer(f"cannot be unpacked: it has a symbolic link to a name of {len(node.target)} bytes")
            node.size = len(node.target)
            node.block = self._output.position // BLOCK
        self._queue(node, node.target)

    def finish(self, root: Directory, uuid: bytes) -> None:
        """Write the directories, what they have that was not added, and the superblock.

        Raises:
            BadLayer: The root has more attributes than there is room for.
            OSError: See write(2).
        """
        self._flush_inodes()
        directories, linked = self._survey(root)
        self._flush_inodes()
        first = self._write_directories(directories)
        if len(first) > BLOCK - _ROOT_AT:
            raise BadLayer("cannot be unpacked: its root directory has more attributes than there is room for")
        end = self._output.position
        self._output.flush()
        for node in linked:
            os.pwrite(self._descriptor, node.names.to_bytes(4, "little"), node.nid * _SLOT + _NAMES_OFFSET)
        count = self._inodes + len(directories)
        feature = (_HAS_MTIME, BLOCK.bit_length() - 1, 0)
        head = _SUPER.pack(_MAGIC, 0, *feature, _ROOT_NID, count, 0, 0, end // BLOCK, 0, 0, uuid, b"", 0)
        os.pwrite(self._descriptor, head + first, _SUPER_OFFSET)
        os.ftruncate(self._descriptor, end)

    def _queue(self, node: Node, tail: bytes) -> None:
        """Have an inode written later, with the end of its content; one that is too long for that is written at once."""
        if not _behind(node):
            self._output.write(tail)
            self._output.align()
            tail = b""
        self._inodes += 1
        self._pending.append((node, tail))
        self._pending_size += _INODE.size + len(tail)
        if self._pending_size >= _INODES_AT_ONCE:
            self._flush_inodes()

    def _flush_inodes(self) -> None:
        at = self._output.position
        parts: list[bytes] = []
        for node, tail in self._pending:
            inode = _inode(node, tail)
            start, end = _place(at, len(inode))
            node.nid = start // _SLOT
            node.xattrs.clear()  # or all of them would stay in memory
            parts += (bytes(start - at), inode, bytes(end - start - len(inode)))
            at = end
        self._output.write(b"".join(parts))
        self._output.align()
        self._pending.clear()
        self._pending_size = 0

    def _survey(self, root: Directory) -> tuple[list[_Place], list[Node]]:
        """Return every directory with its parent, and the files of several names; count names and sort them.

        What has no inode yet gets one.
        """
        found = [(root, root)]
        linked = []
        for directory, _ in found:  # grows meanwhile
            directory.children = dict(sorted(directory.children.items()))
            directory.names = 2
            for child in directory.children.values():
                if isinstance(child, Directory):
                    directory.names += 1
                    found.append((child, directory))
                    continue
                child.names += 1
                if child.names == 2:
                    linked.append(child)
                elif child.names == 1 and not child.nid:
                    self.add(child)
        return found, linked

    def _write_directories(self, places: list[_Place]) -> bytes:
        """Write the directories' content and then their inodes, but for the root's, which is returned."""
        _plan(places, self._output.position)
        first = b""
        for directory, parent in places:
            content = _entries(directory, parent)
            behind = _behind(directory)
            self._output.write(content[: len(content) - behind])
            self._output.align()
            tail = content[len(content) - behind :]
            if directory.nid == _ROOT_NID:
                first = _inode(directory, tail)
            else:
                self._pending.append((directory, tail))
        self._flush_inodes()
        return first


def _plan(places: list[_Place], position: int) -> None:
    """Decide where directories go: the content of all of them from a position on, then the inodes."""
    block = position // BLOCK
    for directory, parent in places:
        directory.nid = _ROOT_NID if directory is parent else 0
        directory.size = _size(directory)
        directory.block = block
        block += -(-(directory.size - _behind(directory)) // BLOCK)
    at = block * BLOCK
    for directory, parent in places:
        if directory is not parent:
            start, at = _place(at, _inode_size(directory) + _behind(directory))
            directory.nid = start // _SLOT


def _place(at: int, size: int) -> tuple[int, int]:
    """Return where an inode that long begins and ends; it is in one block if it fits into one, with all behind it."""
    if at % BLOCK + size > BLOCK:
        at += -at % BLOCK
    return at, at + size + -size % _SLOT


def _behind(node: Node) -> int:
    """Return how many bytes of a file's content are behind its inode."""
    tail = node.size % BLOCK
    room = BLOCK - _ROOT_AT if node.nid == _ROOT_NID else BLOCK
    return tail if _inode_size(node) + tail <= room else 0


def _inode_size(node: Node) -> int:
    return _INODE.size + (len(_xattrs(node)) if node.xattrs else 0)


def _inode(node: Node, tail: bytes) -> bytes:
    xattrs = _xattrs(node) if node.xattrs else b""
    form = _EXTENDED | (_TAIL_BEHIND if tail else 0)
    slots = (len(xattrs) - len(_XATTRS_HEADER)) // 4 + 1 if xattrs else 0
    owner = (node.uid, node.gid, node.mtime, node.mtime_ns)
    return _INODE.pack(form, slots, node.mode, node.size, node.block, 0, *owner, node.names or 1) + xattrs + tail


def _xattrs(node: Node) -> bytes:
    found = [_XATTRS_HEADER]
    for name, value in node.xattrs.items():
        prefix, dot, rest = name.partition(b".")
        found += (_XATTR.pack(len(rest), _XATTR_PREFIXES[prefix + dot], len(value)), rest, value)
        found.append(bytes(-(len(rest) + len(value)) % 4))
    return b"".join(found)


def _size(directory: Directory) -> int:
    blocks = list(_blocks(directory))
    return (len(blocks) - 1) * BLOCK + sum(_DIRENT.size + len(name) for name in blocks[-1])


def _entries(directory: Directory, parent: Directory) -> bytes:
    """Return a directory's content: in each block, its entries and then their names."""
    nodes = {**directory.children, b".": directory, b"..": parent}
    content = b""
    for names in _blocks(directory):
        at = _DIRENT.size * len(names)
        entries = []
        for name in names:
            node = nodes[name]
            entries.append(_DIRENT.pack(node.nid, at, _TYPES[stat.S_IFMT(node.mode)]))
            at += len(name)
        content += bytes(-len(content) % BLOCK) + b"".join(entries) + b"".join(names)
    return content


def _blocks(directory: Directory) -> Iterator[list[bytes]]:
    """Yield the names of a directory in order, as many at a time as a block has room for."""
    names: list[bytes] = []
    used = 0
    for name in sorted([*directory.children, b".", b".."]):
        used += _DIRENT.size + len(name)
        if used > BLOCK:
            yield names
            names, used = [], _DIRENT.size + len(name)
        names.append(name)
    yield names
