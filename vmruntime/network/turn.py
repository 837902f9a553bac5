"""One plugin run at a time for a sandbox, over the death of a daemon.

A plugin that is at work when its daemon is killed goes on by itself. If the next daemon ran DEL beside it, the plugin could make
what DEL has just removed. So plugins inherit a locked descriptor: the lock is free once the last of them has ended,
however its daemon ended (flock(2)).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

from vmruntime.errors import ResourceExhausted
from vmruntime.network.errors import NetworkError

INTERVAL = 0.05


@contextlib.asynccontextmanager
async def turn(path: Path, timeout: float) -> AsyncIterator[int]:
    """Hold a lock file's lock; yield the descriptor for plugins to inherit.

    Args:
        path: The file; made when it is missing.
        timeout: Seconds to wait for plugins of an earlier daemon.

    Raises:
        NetworkError: One of them is still at work, or the file cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NetworkError(
            f"{path} cannot be made: {error.strerror}",
            remedy="make room or mend the file system",
            code=ResourceExhausted.code,
        ) from error
    try:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not _locked(fd):
            if loop.time() > deadline:
                raise NetworkError(
                    f"a CNI plugin that an earlier daemon started is still at work after {timeout:g} s",
                    remedy="it is tried again; end the plugin if it hangs",
                )
            await asyncio.sleep(INTERVAL)
        yield fd
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
