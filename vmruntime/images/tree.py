"""An unpacked layer, made ready for overlayfs: whiteouts, opaque directories, times.

Formats: "Representing Changes" of the OCI image layer spec; the kernel's Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from vmruntime.errors import ResourceExhausted
from vmruntime.images.manifest import BadImage

PREFIX = ".wh."
OPAQUE = ".wh..wh..opq"
# AUFS's own bookkeeping (hard link store, orphans) that old tools left in layers.
_META_PREFIX = ".wh..wh."
_OPAQUE_XATTR = "trusted.overlay.opaque"


@dataclasses.dataclass
class Marks:
    """What the whiteout files of one directory say.

    Attributes:
        gone: Names that lower layers have and the image has not.
        opaque: Nothing of lower layers shows in this directory.
        files: The whiteout files themselves.
    """

    gone: list[str]
    opaque: bool
    files: list[str]


def read_marks(names: list[str]) -> Marks:
    """Sort the whiteouts out of a directory's names.

    Raises:
        BadImage: A whiteout of ".", ".." or of nothing.
    """
    marks = Marks([], False, [])
    for name in names:
        if not name.startswith(PREFIX):
            continue
        marks.files.append(name)
        if name == OPAQUE:
            marks.opaque = True
        elif not name.startswith(_META_PREFIX):
            victim = name.removeprefix(PREFIX)
            if victim in ("", ".", ".."):
                raise BadImage(f"a layer has the whiteout {name!r}, which names no file")
            marks.gone.append(victim)
    return marks


def finish(root: Path, limit: int, unpacked_at_ns: int) -> None:
    """Turn whiteouts into overlayfs's form and settle times.

    Directories that the tar does not list, and those that changed here, have the time of unpacking: it becomes
    the epoch, so that the same layer gives the same bytes on every host.

    Args:
        root: The unpacked layer; nobody else has access to it.
        limit: Most bytes of its files together, holes included: mkfs.erofs writes holes out.
        unpacked_at_ns: When unpacking began.

    Raises:
        BadImage: A whiteout that makes no sense.
        ResourceExhausted: The files are larger than the limit (sparse files in a small tar).
    """
    total = 0
    counted: set[int] = set()
    for directory, entries in _walk(root):
        for _, status in entries:
            if stat.S_ISREG(status.st_mode) and (status.st_nlink == 1 or status.st_ino not in counted):
                total += status.st_size
                if status.st_nlink > 1:
                    counted.add(status.st_ino)
        if total > limit:
            raise ResourceExhausted(
                f"the files of a layer take more than {limit} bytes, holes included",
                remedy="raise images.max_layer_gib if the image is to be trusted",
            )
        _finish_directory(directory, entries, unpacked_at_ns)


def _walk(root: Path) -> Iterator[tuple[str, list[tuple[str, os.stat_result]]]]:
    """Yield every directory with its entries, children first; links are not followed."""
    pending = [(str(root), False)]
    held: dict[str, list[tuple[str, os.stat_result]]] = {}
    while pending:
        directory, seen = pending.pop()
        if seen:
            yield directory, held.pop(directory)
            continue
        with os.scandir(directory) as scan:
            entries = [(entry.name, entry.stat(follow_symlinks=False)) for entry in scan]
        held[directory] = entries
        pending.append((directory, True))
        pending += [(f"{directory}/{name}", False) for name, status in entries if stat.S_ISDIR(status.st_mode)]


def _finish_directory(directory: str, entries: list[tuple[str, os.stat_result]], unpacked_at_ns: int) -> None:
    status = os.lstat(directory)
    marks = read_marks([name for name, _ in entries])
    if marks.files:
        kinds = {name: found.st_mode for name, found in entries}
        for name in marks.files:
            _remove(f"{directory}/{name}", kinds[name])
        for victim in marks.gone:
            _white_out(f"{directory}/{victim}", kinds.get(victim))
        if marks.opaque:
            os.setxattr(directory, _OPAQUE_XATTR, b"y")
    modified = 0 if status.st_mtime_ns >= unpacked_at_ns else status.st_mtime_ns
    if marks.files or modified != status.st_mtime_ns:
        os.utime(directory, ns=(modified, modified))


def _white_out(path: str, present: int | None) -> None:
    """Hide what lower layers have under this name; what this layer has there itself stays."""
    if present is None:
        os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        os.utime(path, ns=(0, 0))
    elif stat.S_ISDIR(present):
        os.setxattr(path, _OPAQUE_XATTR, b"y")  # a directory would otherwise merge with the one below


def _remove(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)
