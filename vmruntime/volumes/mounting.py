"""mount(2), umount2(2) and mount_setattr(2), which Python's library lacks.

The calls block (a dead network file system may do so for long): use them in a thread.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import re
import struct
from pathlib import Path

import msgspec


class Flag(enum.IntFlag):
    """Flags of mount(2), from linux/mount.h."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    REMOUNT = 0x20
    BIND = 0x1000
    REC = 0x4000
    PRIVATE = 0x40000
    SLAVE = 0x80000
    SHARED = 0x100000


_MNT_DETACH = 0x2
_UMOUNT_NOFOLLOW = 0x8
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_IDMAP = 0x100000
# The same numbers on every architecture (asm-generic/unistd.h, since Linux 5.2 and 5.12).
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)


class MountEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of /proc/self/mountinfo (proc(5)).

    Attributes:
        device: major:minor of the file system.
        root: What of the file system is mounted there.
        receives: Whether mounts made in another place can appear below it (shared, or a slave).
    """

    mount_point: str
    fs_type: str
    device: str
    root: str
    receives: bool


def mount(source: str, target: Path, fs_type: str = "", flags: int = 0, data: str = "") -> None:
    """Mount; raise OSError naming the target."""
    arguments = (os.fsencode(source), os.fsencode(target), fs_type.encode() or None, int(flags), data.encode() or None)
    _check(_libc.mount(*arguments[:3], ctypes.c_ulong(arguments[3]), arguments[4]), target)


def detach(target: Path) -> None:
    """Detach whatever is mounted at a path with all that is mounted below; nothing there: success."""
    while True:
        if _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            if number in (errno.EINVAL, errno.ENOENT):
                return
            raise OSError(number, os.strerror(number), str(target))


class NotMappable(OSError):
    """Raised when the kernel refuses to map the ids of a file system."""


def clone(
    source: str, propagation: Flag, *, readonly: bool = False, recursive_readonly: bool = False, ids: int = -1
) -> int:
    """Return a copy of the mount at a path, with all that is mounted below it, which is attached nowhere yet.

    Args:
        source: An existing path.
        propagation: Flag.PRIVATE, or Flag.SLAVE to receive later mounts from the source.
        readonly: The mount of the source itself cannot be written through.
        recursive_readonly: Nor can those below it.
        ids: Descriptor of the user namespace to whose ids the files are to belong (those of the mounts below are left
            alone); negative: they keep their owners.

    Returns:
        A descriptor for attach(), the caller's to close; closed without it, the copy is gone.

    Raises:
        NotMappable: Their ids cannot be mapped.
        OSError: ENOSYS where the kernel is older than 5.12.
    """
    tree = _syscall(_SYS_OPEN_TREE, _AT_FDCWD, source, _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE)
    try:
        _set_attributes(tree, 0, int(propagation), recursive=True)
        if readonly:
            _set_attributes(tree, _MOUNT_ATTR_RDONLY, 0, recursive=recursive_readonly)
        if ids >= 0:
            _map_ids(tree, ids)
    except BaseException:
        os.close(tree)
        raise
    return tree


def attach(tree: int, target: Path) -> None:
    """Put what clone() made at a place of the calling thread's mount namespace: a directory, or a file for a file."""
    _syscall(_SYS_MOVE_MOUNT, tree, "", _AT_FDCWD, str(target), _MOVE_MOUNT_F_EMPTY_PATH)


def map_ids(target: Path, ids: int) -> None:
    """Replace a mount by one whose files belong to a user namespace's ids; see clone().

    Raises:
        NotMappable: Their ids cannot be mapped; the mount is as it was.
    """
    copy = _syscall(_SYS_OPEN_TREE, _AT_FDCWD, str(target), _OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        _map_ids(copy, ids)
        detach(target)
        attach(copy, target)
    finally:
        os.close(copy)


def make_readonly(target: Path) -> None:
    """Let nobody write through the mount at a path of the calling thread's namespace; those below stay as they are."""
    tree = os.open(target, os.O_PATH | os.O_CLOEXEC)
    try:
        _set_attributes(tree, _MOUNT_ATTR_RDONLY, 0, recursive=False)
    finally:
        os.close(tree)


def mounts() -> list[MountEntry]:
    """Return every mount of this process's namespace, in mount order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        _, _, device, root, point, _, *optional = before.split(" ")
        found.append(
            MountEntry(
                mount_point=_unescaped(point),
                fs_type=after.split(" ")[0],
                device=device,
                root=_unescaped(root),
                receives=any(field.startswith(("shared:", "master:")) for field in optional),
            )
        )
    return found


def _unescaped(path: str) -> str:
    """Undo the kernel's octal escapes of blanks, newlines and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def is_below(path: str, parent: str) -> bool:
    """Whether a path lies strictly below another one."""
    return path.startswith(parent.rstrip("/") + "/") and path != parent


def _map_ids(tree: int, ids: int) -> None:
    try:
        _set_attributes(tree, _MOUNT_ATTR_IDMAP, 0, recursive=False, ids=ids)
    except OSError as error:
        raise NotMappable(error.errno, error.strerror) from error


def _set_attributes(tree: int, attributes: int, propagation: int, *, recursive: bool, ids: int = 0) -> None:
    """Call mount_setattr(2) on a detached tree; its structure is attr_set, attr_clr, propagation, userns_fd."""
    wanted = struct.pack("=QQQQ", attributes, 0, propagation, ids)
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    _syscall(_SYS_MOUNT_SETATTR, tree, "", flags, wanted, len(wanted))


def _syscall(number: int, *arguments: int | str | bytes) -> int:
    converted = [
        ctypes.c_long(one) if isinstance(one, int) else os.fsencode(one) if isinstance(one, str) else one
        for one in arguments
    ]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _check(result: int, target: Path) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
