"""Files that decide what runs as root."""

from __future__ import annotations

import stat
from pathlib import Path

from vmruntime.errors import FailedPrecondition

LIMIT_BYTES = 1024 * 1024


def read_trusted(path: Path, remedy: str) -> bytes:
    """Return a file's content.

    Raises:
        FailedPrecondition: It cannot be read, is too large, or anybody may write it.
    """
    try:
        check_trust(path, "it")
        if path.stat().st_size > LIMIT_BYTES:
            raise FailedPrecondition(f"{path}: larger than 1 MiB", remedy=remedy)
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"{path}: cannot be read: {error.strerror}") from error


def check_trust(path: Path, what: str, file: Path | None = None) -> None:
    """Refuse what anybody may write.

    Args:
        path: The file.
        what: What it is, for the message.
        file: The file that names it; None: it is that file.

    Raises:
        FailedPrecondition: Everybody may write it.
        OSError: It is not there.
    """
    if path.stat().st_mode & stat.S_IWOTH:
        raise FailedPrecondition(f"{file or path}: {what} may be written by everybody", remedy=f"chmod o-w {path}")
