"""Files that decide what runs as root."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vmruntime.errors import FailedPrecondition

LIMIT_BYTES = 1024 * 1024
MOST_LINKS = 40  # as the kernel has it: path_resolution(7)
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def read_trusted(path: Path, remedy: str) -> bytes:
    """Return a file's content.

    Raises:
        FailedPrecondition: It cannot be read, is too large, or others than root and the daemon's user may change it.
    """
    try:
        check_trust(path, "it")
        # Not blocking: it may be a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            _check(path, status, "it", path)
            if not stat.S_ISREG(status.st_mode):
                raise FailedPrecondition(f"{path}: not a file", remedy=remedy)
            content = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise FailedPrecondition(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > LIMIT_BYTES:
        raise FailedPrecondition(f"{path}: larger than 1 MiB", remedy=remedy)
    return content


def check_trust(path: Path, what: str, file: Path | None = None) -> None:
    """Refuse what others than root and the daemon's user may change, or put something else in place of.

    Args:
        path: The file; each directory and symbolic link on the way to it counts too.
        what: What it is, for the message.
        file: The file that names it; None: it is that file.

    Raises:
        FailedPrecondition: Others may.
        OSError: It is not there.
    """
    for step in _steps(path.absolute()):
        named = what if step == path.absolute() else f"{what}, reached through {step}, which"
        _check(step, step.lstat(), named, file or path)


def _check(path: Path, status: os.stat_result, what: str, file: Path) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise FailedPrecondition(f"{file}: {what} belongs to the user {status.st_uid}", remedy=f"chown root {path}")
    # In a sticky directory nobody replaces what is another user's, and what is in it is the next step. A link has no mode.
    kept = stat.S_ISLNK(status.st_mode) or (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX)
    if status.st_mode & _WRITABLE and not kept:
        raise FailedPrecondition(f"{file}: {what} may be written by others than its owner", remedy=f"chmod go-w {path}")


def _steps(path: Path) -> Iterator[Path]:
    """Yield everything that is passed on the way to a file, links included, and the file."""
    at, links = Path("/"), 0
    todo = list(reversed(path.parts[1:]))
    yield at
    while todo:
        name = todo.pop()
        if name == "..":
            at = at.parent
            continue
        yield at / name
        try:
            target = (at / name).readlink()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            at = at / name
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        at = Path("/") if target.is_absolute() else at
        todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)
