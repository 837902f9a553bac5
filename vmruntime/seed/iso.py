"""An ISO 9660 image with a few files in it, by pycdlib: Rock Ridge for Linux, Joliet for Windows (cloudbase-init)."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pycdlib
from pycdlib import dates, headervd, inplaceeditor, utils
from pycdlib import pycdlib as implementation
from pycdlib.pycdlibexception import PyCdlibException

from vmruntime.errors import InvalidArgument, ResourceExhausted

SIZE_LIMIT = 32 * 1024 * 1024
"""Bytes; cloud-init holds all of it in memory, in a guest that may have little."""

LABEL_LIMIT = 16  # Joliet's volume identifier has 32 bytes of UCS-2
NAME_LIMIT = 31  # of an ISO 9660 file identifier with its version left out
FILE_MODE, DIRECTORY_MODE = 0o100444, 0o040555

_EPOCH = 315532800.0  # 1980-01-01, before which FAT and some readers know no time
_NOT_IN_IDENTIFIER = re.compile(r"[^A-Z0-9_]")


class _Clock:
    """Stands for the module `time` in pycdlib, which has no other way to be told a date: the same bytes at all times."""

    def localtime(self, seconds: float) -> time.struct_time:
        return time.gmtime(seconds)

    def time(self) -> float:
        return _EPOCH

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


for _module in (implementation, headervd, dates, inplaceeditor, utils):
    if hasattr(_module, "time"):
        vars(_module)["time"] = _Clock()


def iso_image(files: Mapping[str, bytes], label: str, *, limit: int = SIZE_LIMIT) -> bytes:
    """Return an image; the same files and label give the same bytes.

    Args:
        files: Content by relative path, such as openstack/latest/user_data.
        label: Volume identifier, printable ASCII.
        limit: Most bytes.

    Raises:
        ResourceExhausted: It would be larger.
        InvalidArgument: A path or the label cannot be had.
    """
    if not label or len(label) > LABEL_LIMIT or not label.isascii() or not label.isprintable():
        raise InvalidArgument.field("label", label, f"is not 1 to {LABEL_LIMIT} printable ASCII characters")
    content = sum(map(len, files.values()))
    if content > limit:
        raise _too_large(content, limit)
    image = pycdlib.PyCdlib()
    out = io.BytesIO()
    try:
        image.new(interchange_level=3, vol_ident=label, joliet=3, rock_ridge="1.09")
        directories: set[str] = set()
        for path in sorted(files):
            _check(path)
            _add_directories(image, posixpath.dirname(path), directories)
            data = files[path]
            image.add_fp(
                io.BytesIO(data),
                len(data),
                _iso_file(path),
                rr_name=posixpath.basename(path),
                joliet_path=f"/{path}",
                file_mode=FILE_MODE,
            )
        image.write_fp(out)
    except PyCdlibException as error:
        raise InvalidArgument(f"the seed's image cannot be made: {error}") from error
    finally:
        image.close()
    if len(out.getbuffer()) > limit:
        raise _too_large(len(out.getbuffer()), limit)
    return out.getvalue()


def write_image(data: bytes, out: Path | int) -> None:
    """Write an image to a new file that only its owner can read, or to an open descriptor; it is on the disk then.

    Raises:
        OSError: It cannot be written; a file that was made is gone again.
    """
    if isinstance(out, int):
        _write(out, data)
        return
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write(descriptor, data)
    except BaseException:
        with contextlib.suppress(OSError):
            out.unlink()
        raise
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _add_directories(image: Any, directory: str, known: set[str]) -> None:
    if directory and directory not in known:
        _add_directories(image, posixpath.dirname(directory), known)
        known.add(directory)
        name = posixpath.basename(directory)
        image.add_directory(_iso_path(directory), rr_name=name, joliet_path=f"/{directory}", file_mode=DIRECTORY_MODE)


def _iso_path(path: str) -> str:
    """Return a directory's path in the characters that ISO 9660 has; readers of Rock Ridge or Joliet never see it."""
    return "".join(f"/{_NOT_IN_IDENTIFIER.sub('_', part.upper())}" for part in path.split("/")) if path else ""


def _iso_file(path: str) -> str:
    """Return a file's path, with the full stop and the version that it has to have there."""
    name, _, extension = posixpath.basename(path).upper().rpartition(".")
    identifier = ".".join(
        _NOT_IN_IDENTIFIER.sub("_", part) for part in ((name, extension) if name else (extension, ""))
    )
    return f"{_iso_path(posixpath.dirname(path))}/{identifier};1"


def _check(path: str) -> None:
    for part in path.split("/"):
        if not part.strip(".") or len(part) >= NAME_LIMIT or not part.isprintable():
            raise InvalidArgument.field("path", path, f"has a name that is empty, dots or longer than {NAME_LIMIT - 1}")


def _too_large(size: int, limit: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"the pod's cloud-init data have {size} bytes; {limit} are possible",
        remedy="mount large ConfigMaps, Secrets and files as volumes instead of copying them",
    )
