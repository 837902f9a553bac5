"""A layer's files as a tree in memory: where the members of a tar go, and what whiteouts make of it.

There is no file system that names and links could lead out of: a path is what it leads to in the tree.

Formats: "Representing Changes" of the OCI image layer spec; the kernel's Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterable

from vmruntime.images.unpacker.problems import BadLayer, TooLarge, shown

PREFIX = b".wh."
OPAQUE = b".wh..wh..opq"
# AUFS's own bookkeeping (hard link store, orphans) that old tools left in layers.
_META_PREFIX = b".wh..wh."
OPAQUE_XATTR = b"trusted.overlay.opaque"

NAME_LIMIT = 255  # NAME_MAX, and EROFS's
PATH_LIMIT = 4095  # PATH_MAX, with its NUL
NODES_LIMIT = 1_000_000
"""Files and directories of one layer. Each takes some 700 bytes of memory while the layer is made."""
_LINKS_LIMIT = 40  # as the kernel's


class Node:
    """A file of any kind.

    Attributes:
        mode: With the kind (inode(7)).
        mtime, mtime_ns: Seconds since the epoch, and nanoseconds to add.
        size: Bytes of a regular file.
        target: Of a symbolic link.
        device: Major and minor number.
        xattrs: By full name.
        names: How many the finished tree has for it.
        block: Where its content begins in the image.
        nid: Its inode's number in the image; 0: it has none yet.
    """

    __slots__ = (
        *("block", "device", "gid", "mode", "mtime", "mtime_ns", "names", "nid"),
        *("size", "target", "uid", "xattrs"),
    )

    def __init__(self, mode: int, uid: int = 0, gid: int = 0, mtime: int = 0, mtime_ns: int = 0) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.mtime_ns = mtime_ns
        self.size = 0
        self.target = b""
        self.device = (0, 0)
        self.xattrs: dict[bytes, bytes] = {}
        self.names = 0
        self.block = 0
        self.nid = 0


class Directory(Node):
    """A directory; by default one that the tar does not list.

    Its time is the epoch then, so that the same layer gives the same bytes on every host.
    """

    __slots__ = ("children",)

    def __init__(
        self, mode: int = stat.S_IFDIR | 0o755, uid: int = 0, gid: int = 0, mtime: int = 0, mtime_ns: int = 0
    ) -> None:
        super().__init__(mode, uid, gid, mtime, mtime_ns)
        self.children: dict[bytes, Node] = {}


class Tree:
    """The root and all below it, as far as the tar has been read."""

    def __init__(self, limit: int = NODES_LIMIT) -> None:
        self.root = Directory()
        self._limit = limit
        self._count = 0

    def put(self, path: bytes, node: Node) -> None:
        """Give a node a name; of an earlier one with this name only a directory stays, when a directory comes.

        Raises:
            BadLayer: The name leads out of the tree, or into what is no directory.
            TooLarge: There are too many nodes.
        """
        parts = _parts(path)
        if not parts:
            if not isinstance(node, Directory):
                raise BadLayer("cannot be unpacked: it has something else than a directory for its root")
            _become(self.root, node)
            return
        parent = self._directory(parts[:-1], path)
        present = parent.children.get(parts[-1])
        if isinstance(present, Directory) and isinstance(node, Directory):
            _become(present, node)
        else:
            self._add(parent, parts[-1], node)

    def link(self, path: bytes, target: bytes) -> None:
        """Give a file that is there one more name.

        Raises:
            BadLayer: There is none, or it is a directory, or as with put().
        """
        parts = _parts(target)
        node = self._directory(parts[:-1], target).children.get(parts[-1]) if parts else None
        if node is None or isinstance(node, Directory):
            what = "a directory" if node or not parts else "there is nothing"
            raise BadLayer(f"cannot be unpacked: {shown(path)} is a hard link to {shown(target)}, where {what} is")
        self.put(path, node)

    def _directory(self, parts: list[bytes], path: bytes) -> Directory:
        """Return the directory that a path leads to, made as far as it is missing.

        Links are followed where GNU tar follows them: when they lead downwards from where they are. Others could lead
        elsewhere once the layer lies on top of another.
        """
        here = self.root
        links = 0
        pending = parts[::-1]
        while pending:
            name = pending.pop()
            child = here.children.get(name)
            if child is None:
                child = Directory()
                self._add(here, name, child)
            if isinstance(child, Directory):
                here = child
                continue
            steps = child.target.split(b"/")
            links += 1
            if not stat.S_ISLNK(child.mode) or not steps[0] or b".." in steps or links > _LINKS_LIMIT:
                raise BadLayer(f"cannot be unpacked: the path {shown(path)} leads through {shown(name)}, no directory")
            pending += [step for step in reversed(steps) if step not in (b"", b".")]
        return here

    def _add(self, parent: Directory, name: bytes, node: Node) -> None:
        if len(name) > NAME_LIMIT:
            raise BadLayer(f"cannot be unpacked: it has a name of {len(name)} bytes, {shown(name)}")
        self._count += 1
        if self._count > self._limit:
            raise TooLarge(f"has more than {self._limit} files and directories")
        parent.children[name] = node


def _parts(path: bytes) -> list[bytes]:
    parts = [part for part in path.split(b"/") if part and part != b"."]
    if b".." in parts:
        raise BadLayer(f"cannot be unpacked: it has a name with '..', {shown(path)}")
    if len(path) > PATH_LIMIT or b"\0" in path or not path:
        raise BadLayer(f"cannot be unpacked: it has a name of {len(path)} bytes, {shown(path)}")
    return parts


def _become(present: Directory, new: Directory) -> None:
    present.mode, present.uid, present.gid = new.mode, new.uid, new.gid
    present.mtime, present.mtime_ns, present.xattrs = new.mtime, new.mtime_ns, new.xattrs


@dataclasses.dataclass
class Marks:
    """What the whiteout files of one directory say.

    Attributes:
        gone: Names that lower layers have and the image has not.
        opaque: Nothing of lower layers shows in this directory.
        files: The whiteout files themselves.
    """

    gone: list[bytes]
    opaque: bool
    files: list[bytes]


def read_marks(names: Iterable[bytes]) -> Marks:
    """Sort the whiteouts out of a directory's names.

    Raises:
        BadLayer: A whiteout of ".", ".." or of nothing.
    """
    marks = Marks([], False, [])
    for name in names:
        if not name.startswith(PREFIX):
            continue
        marks.files.append(name)
        if name == OPAQUE:
            marks.opaque = True
        elif not name.startswith(_META_PREFIX):
            victim = name.removeprefix(PREFIX)
            if victim in (b"", b".", b".."):
                raise BadLayer(f"cannot be unpacked: it has the whiteout {shown(name)}, which names no file")
            marks.gone.append(victim)
    return marks


def settle(root: Directory) -> None:
    """Turn whiteouts into overlayfs's form: devices 0/0, and an attribute of directories.

    Raises:
        BadLayer: A whiteout makes no sense.
    """
    pending = [root]
    while pending:
        directory = pending.pop()
        marks = read_marks(directory.children)
        for name in marks.files:
            del directory.children[name]
        for victim in marks.gone:
            _white_out(directory, victim)
        if marks.opaque:
            directory.xattrs[OPAQUE_XATTR] = b"y"
        pending += [child for child in directory.children.values() if isinstance(child, Directory)]


def _white_out(directory: Directory, victim: bytes) -> None:
    """Hide what lower layers have under this name; what this layer has there itself stays."""
    present = directory.children.get(victim)
    if present is None:
        directory.children[victim] = Node(stat.S_IFCHR)
    elif isinstance(present, Directory):
        present.xattrs[OPAQUE_XATTR] = b"y"  # it would otherwise merge with the one below
