"""The program: reads a blob, writes an image, says in one line of JSON what became of it.

    python -I -c 'import sys; sys.path.append("…"); from vmruntime.images.unpacker.main import main; main()'
        BLOB-FD IMAGE-FD DIFF-ID UUID LIMIT

It becomes nobody before it reads a byte, whom nothing belongs to; the two descriptors are all that it can read and write.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import resource
import signal
import stat
import sys
import uuid

from vmruntime.errors import FailedPrecondition
from vmruntime.images.unpacker import tree
from vmruntime.images.unpacker.blob import CheckedTar
from vmruntime.images.unpacker.image import Image
from vmruntime.images.unpacker.problems import BadLayer, TooLarge, shown
from vmruntime.images.unpacker.tar import HARD_LINK, Member, Source, Tar
from vmruntime.images.unpacker.tree import Directory, Node, Tree

_NOBODY = 65534
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h
# What NODES_LIMIT nodes need, twice.
_ADDRESS_SPACE = 2 * 1024**3
_XATTR_VALUE_LIMIT = 2**16 - 1  # XATTR_SIZE_MAX is one more, which EROFS has no room for
_XATTRS_LIMIT = 64 * 1024
# What a writer that holds the interpreter may keep the decompressing thread waiting; Python's own is 5 ms.
_SWITCH_SECONDS = 0.0005


def main() -> None:
    """Run the program."""
    blob, image = int(sys.argv[1]), int(sys.argv[2])
    drop_privileges()
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.disable()  # there is nothing to be found before the end, among very many objects
    print(json.dumps(run(blob, image, *sys.argv[3:])))  # noqa: T201


def drop_privileges() -> None:
    """Become nobody, for good, with bounded memory, to end when the parent does.

    A process that has changed its user so is not open to others of this user (ptrace(2), PR_SET_DUMPABLE of prctl(2)).
    """
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_PDEATHSIG, signal.SIGKILL)):
        if libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def run(blob: int, image: int, diff_id: str, identity: str, limit: str) -> dict[str, str]:
    """Make the image, and return what is wrong, a kind and a message; nothing when all is well.

    Kinds: "bad", "large", "full" (of the disk), "missing" (of a program).
    """
    with open(blob, "rb", buffering=0) as file:
        checked = CheckedTar(file, diff_id, int(limit))
        try:
            unpack(checked, image, uuid.UUID(identity).bytes, int(limit))
        except BadLayer as error:
            return {"problem": "bad", "message": str(error)}
        except TooLarge as error:
            return {"problem": "large", "message": str(error)}
        except FailedPrecondition as error:
            return {"problem": "missing", "message": error.message}
        except MemoryError:
            return {"problem": "large", "message": "takes more memory than may be used to unpack it"}
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return {"problem": "full", "message": f"of {checked.size} bytes or more"}
    return {}


def unpack(checked: CheckedTar, descriptor: int, identity: bytes, limit: int) -> None:
    """Make an image of a tar.

    Args:
        checked: The tar; read to its end.
        descriptor: An empty file.
        identity: The image's UUID.
        limit: Most bytes of all files together, holes included.

    Raises:
        BadLayer, TooLarge: See there.
        OSError: It cannot be written.
    """
    source = Source(checked)
    tar, files, image = Tar(source), Tree(), Image(descriptor)
    total = 0
    for member in tar:
        if member.kind == HARD_LINK:
            files.link(member.path, member.link)
            continue
        node = _node(member)
        files.put(member.path, node)
        if member.kind == stat.S_IFREG:
            total += member.size
            if total > limit:
                raise TooLarge(f"has files of more than {limit} bytes, holes included")
            node.size = member.size
            image.add_file(node, tar.content())
        elif member.kind != stat.S_IFDIR:
            image.add(node)
    source.drain()
    tree.settle(files.root)
    image.finish(files.root, identity)


def _node(member: Member) -> Node:
    kind = Directory if member.kind == stat.S_IFDIR else Node
    node = kind(member.kind | member.mode, member.uid, member.gid, member.mtime, member.mtime_ns)
    if member.kind == stat.S_IFLNK:
        node.mode = stat.S_IFLNK | 0o777
        node.target = member.link
    node.device = (member.major, member.minor)
    if member.xattrs and member.kind in (stat.S_IFREG, stat.S_IFDIR):
        node.xattrs = _kept(member)
    return node


def _kept(member: Member) -> dict[bytes, bytes]:
    """Return the attributes that a layer may set: trusted.overlay.… would steer the guest's overlayfs."""
    kept: dict[bytes, bytes] = {}
    size = 0
    for name, value in member.xattrs.items():
        if name != b"security.capability" and not name.startswith(b"user."):
            continue
        size += len(name) + len(value)
        if not len(b"user.") < len(name) <= tree.NAME_LIMIT or len(value) > _XATTR_VALUE_LIMIT or size > _XATTRS_LIMIT:
            raise BadLayer(f"cannot be unpacked: {shown(member.path)} has extended attributes that are too long")
        kept[name] = value
    return kept
