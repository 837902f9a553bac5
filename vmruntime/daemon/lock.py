"""One daemon for one set of directories."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from vmruntime.errors import FailedPrecondition


@contextlib.contextmanager
def only_daemon(path: Path) -> Iterator[None]:
    """Hold the lock file while the body runs; the kernel lets go of it however the daemon ends.

    Raises:
        FailedPrecondition: Another daemon holds it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"another vmruntime daemon uses {path.parent}", remedy="stop it, or set other root and run directories"
            ) from None
        yield
    finally:
        os.close(fd)
