"""Network namespaces: with names, as ip-netns(8) has them, or without."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from vmruntime import tracing
from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.userns import user_namespace
from vmruntime.model.sandbox import UserNamespace
from vmruntime.network.errors import NetworkError

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # sched.h
MS_BIND, MS_REC, MS_SHARED, MNT_DETACH, UMOUNT_NOFOLLOW = 0x1000, 0x4000, 0x100000, 0x2, 0x8  # sys/mount.h
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # linux/sockios.h, linux/if.h
DETECTION = Path("/proc/sys/net/ipv6/conf/default/accept_dad")
"""Whether the kernel asks if somebody else has an address: plugins wait two seconds for it, and IPAM knows."""

OWN = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


async def create(path: Path, owner: UserNamespace | None = None) -> None:
    """Make a namespace with its loopback interface up; path.parent is the directory ip-netns(8) uses.

    Args:
        path: Where it is to be.
        owner: A new user namespace with these ids owns it, and lives as long; None: the host's does.

    Raises:
        NetworkError: The kernel refuses; something may be at the path.
    """
    if owner is None:
        await in_thread(lambda: _create(path))
        return
    uids, gids = ((one.container_id, one.host_id, one.length) for one in (owner.uids, owner.gids))
    async with user_namespace(uids, gids, network=True) as pid:
        await in_thread(lambda: name(f"/proc/{pid}/ns/net", path))
    await inside(path, _set_up)


@tracing.timed("network.netns")
async def remove(path: Path) -> None:
    """Remove a namespace; missing: success.

    Raises:
        NetworkError: The kernel refuses.
    """
    await in_thread(lambda: _remove(path))


async def inside(path: Path, function: Callable[[], T]) -> T:
    """Run a blocking function in a thread that is in the namespace meanwhile; see aio.pipeline.in_thread."""

    def run() -> T:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with entered(there):
                return function()
        finally:
            os.close(there)

    return await in_thread(run)


@contextlib.contextmanager
def entered(namespace: int) -> Iterator[None]:
    """Have the thread in the namespace of a descriptor while the block runs."""
    with _back_again():
        _check(_libc.setns(namespace, CLONE_NEWNET), "entered")
        yield


def new() -> int:
    """Return a descriptor of a new namespace with its loopback interface up; it ends with the last one.

    Raises:
        NetworkError: The kernel refuses.
    """
    with _back_again():
        _check(_libc.unshare(CLONE_NEWNET), "made")
        _set_up()
        return os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)


def name(namespace: str | int, path: Path) -> None:
    """Bind a namespace, by path or by descriptor, to a new file, as ip-netns(8) does: other mount namespaces see it too.

    Raises:
        NetworkError: The kernel refuses, or something is there already.
    """
    source = namespace if isinstance(namespace, str) else f"/proc/self/fd/{namespace}"
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _share(path.parent)
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
        _mount(source, path, MS_BIND)
    except OSError as error:
        raise NetworkError(f"the network namespace {path} cannot be made: {error.strerror}") from error


def _create(path: Path) -> None:
    namespace = new()
    try:
        name(namespace, path)
    finally:
        os.close(namespace)


def _remove(path: Path) -> None:
    try:
        if _libc.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EINVAL, errno.ENOENT):  # nothing is mounted, or nothing there
                raise OSError(number, os.strerror(number))
        path.unlink(missing_ok=True)
    except OSError as error:
        raise NetworkError(f"the network namespace {path} cannot be removed: {error.strerror}") from error


def _share(directory: Path) -> None:
    """Make a directory a mount whose mounts are passed on; one that is so already is left alone."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # ip-netns(8) takes it as well
        try:
            _mount("", directory, MS_SHARED | MS_REC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _mount(str(directory), directory, MS_BIND | MS_REC)
            _mount("", directory, MS_SHARED | MS_REC)
    finally:
        os.close(descriptor)


def _mount(source: str, target: Path, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), b"none", ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _set_up() -> None:
    _loopback_up()
    with contextlib.suppress(OSError):  # no IPv6; or plugins have to wait
        DETECTION.write_text("0")


def _loopback_up() -> None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
    except OSError as error:
        raise NetworkError(f"the loopback interface cannot be set up: {error.strerror}") from error


@contextlib.contextmanager
def _back_again() -> Iterator[None]:
    """Have the thread in its own namespace again after the block."""
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            yield
        finally:
            _check(_libc.setns(home, CLONE_NEWNET), "entered")
    finally:
        os.close(home)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise NetworkError(f"a network namespace cannot be {what}: {os.strerror(ctypes.get_errno())}")
