"""Loads seccomp profiles that kubelet put on this host."""

from __future__ import annotations

from pathlib import Path

from vmruntime.errors import InvalidArgument

LIMIT_BYTES = 1024 * 1024
FIELD = "config.linux.security_context.seccomp.localhost_ref"
REMEDY = "put the profile there, below kubelet's seccomp directory"


def load_profile(path: str) -> bytes:
    """Return a profile's JSON text.

    Raises:
        InvalidArgument: The file is missing, too large or not a regular file.
    """
    file = Path(path)
    try:
        if not file.is_file() or file.stat().st_size > LIMIT_BYTES:
            raise InvalidArgument.field(FIELD, path, "is not a file of at most 1 MiB", remedy=REMEDY)
        return file.read_bytes()
    except OSError as error:
        raise InvalidArgument.field(FIELD, path, f"cannot be read: {error.strerror}", remedy=REMEDY) from error
