"""Paths in guests."""

from __future__ import annotations

import posixpath

from vmruntime.errors import InvalidArgument

LIMIT = 4095  # PATH_MAX without the final NUL, path_resolution(7)


def absolute(name: str, path: str, *, word: bool = False) -> str:
    """Return a path in its shortest form.

    Args:
        name: What holds the path, for messages.
        path: As given.
        word: It becomes a field of fstab(5), where cloud-init cannot write spaces.

    Raises:
        InvalidArgument: It is relative, the root, climbs, or has characters that cannot be there.
    """
    shortest = posixpath.normpath(path)
    why = ""
    if not path.startswith("/"):
        why = "is not an absolute path"
    elif ".." in path.split("/"):
        why = "contains '..'"
    elif shortest.strip("/") == "":
        why = "is the root directory"
    elif not path.isprintable() or len(path.encode(errors="replace")) > LIMIT:
        why = "has a control character, or is too long"
    elif word and any(c.isspace() for c in path):
        why = "contains a space, which cloud-init cannot write into fstab"
    if why:
        raise InvalidArgument.field(name, path[:200], why, remedy="give another path in the guest")
    return "/" + shortest.lstrip("/")
