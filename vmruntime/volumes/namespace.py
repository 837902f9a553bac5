"""Calls made in the mount namespace of another process (setns(2), mount_namespaces(7))."""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vmruntime.aio.detached import DetachedProcess

CLONE_FS = 0x200  # sched.h
CLONE_NEWNS = 0x20000
PATIENCE = 10.0
POLL = 0.005

_libc = ctypes.CDLL(None, use_errno=True)


def inside(process: DetachedProcess, root: Path, function: Callable[[], None]) -> None:
    """Run a function in a thread of its own that is in a process's mount namespace. Blocks.

    Args:
        process: Must have made `root` its root directory, or be about to: it is given some seconds.
        root: Where that directory is in this process's namespace.
        function: Sees `root` as "/" and nothing else.

    Raises:
        OSError: ESRCH when the process has ended, ETIMEDOUT when `root` does not become its root; what `function` raises.
    """
    outcome: concurrent.futures.Future[None] = concurrent.futures.Future()

    def work() -> None:
        try:
            _enter(process, os.stat(root))
            function()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    # The thread ends there: setns(2) is for good once it shares no directories with the others.
    thread = threading.Thread(target=work, name="mount-namespace")
    thread.start()
    thread.join()
    outcome.result()


def _enter(process: DetachedProcess, root: os.stat_result) -> None:
    _check(_libc.unshare(CLONE_FS))
    deadline = time.monotonic() + PATIENCE
    there = os.pidfd_open(process.identity.pid)
    try:
        # Asked of the descriptor: in the process's namespace /proc may be another one, or nothing.
        end = select.poll()
        end.register(there, select.POLLIN)
        known = process.alive
        while known and not end.poll(0):
            _check(_libc.setns(there, CLONE_NEWNS))
            if os.path.samestat(os.stat("/"), root):
                return
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"{process.name} does not get ready")
            time.sleep(POLL)
        raise OSError(errno.ESRCH, "its server has ended")
    finally:
        os.close(there)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
