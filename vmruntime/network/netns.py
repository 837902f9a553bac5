"""Named network namespaces, made and removed by ip-netns(8)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.process import last_lines, run
from vmruntime.aio.userns import user_namespace
from vmruntime.model.sandbox import UserNamespace
from vmruntime.network.errors import NetworkError

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # sched.h
_libc = ctypes.CDLL(None, use_errno=True)


async def create(path: Path, owner: UserNamespace | None = None) -> None:
    """Make a namespace with its loopback interface up; path.parent is the directory ip-netns(8) uses.

    Args:
        path: Where it is to be.
        owner: A new user namespace with these ids owns it, and lives as long; None: the host's does.
    """
    if owner is None:
        await _ip(path, "add", path.name)
    else:
        uids, gids = ((one.container_id, one.host_id, one.length) for one in (owner.uids, owner.gids))
        async with user_namespace(uids, gids, network=True) as pid:
            await _ip(path, "attach", path.name, str(pid))
    (await run(["ip", "-n", path.name, "link", "set", "lo", "up"])).check()


async def _ip(path: Path, *arguments: str) -> None:
    done = await run(["ip", "netns", *arguments])
    if done.returncode != 0:
        raise NetworkError(f"the network namespace {path} cannot be made: {last_lines(done.stderr)}")


async def remove(path: Path) -> None:
    """Remove a namespace; missing: success."""
    if not path.exists():
        return
    done = await run(["ip", "netns", "delete", path.name])
    if done.returncode != 0 and path.exists():
        raise NetworkError(f"the network namespace {path} cannot be removed: {last_lines(done.stderr)}")


async def inside(path: Path, function: Callable[[], T]) -> T:
    """Run a blocking function in a thread that is in the namespace meanwhile; see aio.pipeline.in_thread."""
    return await in_thread(lambda: _inside(path, function))


def _inside(path: Path, function: Callable[[], T]) -> T:
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            return function()
        finally:
            _setns(home)
    finally:
        os.close(home)


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise NetworkError(f"a network namespace cannot be entered: {os.strerror(error)}")
