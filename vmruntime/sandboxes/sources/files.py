"""Templates on disk: a later daemon need not boot one. What is read is checked, and then kept in memory of our own.

A template is a directory named after its shape, with `memory` and `scratch` (sparse), `state` and `template.json`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import msgspec
import structlog

from vmruntime.aio import memfile
from vmruntime.model.resources import VmSize
from vmruntime.sandboxes.scratch import HEADROOM_BYTES
from vmruntime.sandboxes.sources.template import MIB, Template

log = structlog.get_logger(__name__)

ABOUT, MEMORY, SCRATCH, STATE = "template.json", "memory", "scratch", "state"
NEW = "new-"
UNUSED_SECONDS = 7 * 24 * 3600.0
LARGEST_STATE = 64 * MIB


class _About(msgspec.Struct, frozen=True, kw_only=True):
    """What template.json says; digests of memory and scratch are memfile.digest()'s."""

    shape: str
    size: VmSize
    memory_sha256: str
    scratch_sha256: str
    scratch_bytes: int
    state_sha256: str


class TemplateFiles:
    """The directory of templates. Everything blocks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, shape: str) -> Template | None:
        """Return a template as it was saved; None: there is none, or it is damaged and now removed."""
        directory = self._path(shape)
        if not directory.exists():
            return None
        try:
            template = _load(directory, shape)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            log.warning("template cannot be used and is removed", file=str(directory), why=str(error))
            _remove(directory)
            return None
        return template

    def save(self, template: Template) -> None:
        """Write a template: all of it or nothing.

        Raises:
            OSError: The disk does not take it; nothing stays.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        usage = os.statvfs(self._directory)
        if usage.f_bavail * usage.f_frsize < HEADROOM_BYTES + template.memory_bytes:
            raise OSError(errno.ENOSPC, "pods need the room that is left there", str(self._directory))
        directory = self._directory / f"{NEW}{template.shape}"
        _remove(directory)
        directory.mkdir(mode=0o700)
        try:
            memory = _saved(template.memory(), directory / MEMORY)
            scratch = _saved(template.scratch(), directory / SCRATCH)
            (directory / STATE).write_bytes(template.state)
            about = _About(
                shape=template.shape,
                size=template.size,
                memory_sha256=memory.digest,
                scratch_sha256=scratch.digest,
                scratch_bytes=scratch.size,
                state_sha256=hashlib.sha256(template.state).hexdigest(),
            )
            (directory / ABOUT).write_bytes(msgspec.json.encode(about))
            _remove(self._path(template.shape))
            directory.rename(self._path(template.shape))
        except BaseException:
            _remove(directory)
            raise

    def remove(self, shape: str) -> None:
        """Remove a template; there is none: success."""
        _remove(self._path(shape))

    def note_use(self, shape: str) -> None:
        """Note that a template is of use, for sweep()."""
        with contextlib.suppress(OSError):
            os.utime(self._path(shape) / ABOUT)

    def sweep(self, keep: Collection[str]) -> None:
        """Remove what is half-made, and templates that have not been of use for a week: their guest or QEMU is another now.

        Args:
            keep: Shapes that are in use.
        """
        if not self._directory.exists():
            return
        for directory in self._directory.iterdir():
            if directory.name in keep:
                continue
            try:
                unused = time.time() - (directory / ABOUT).stat().st_mtime > UNUSED_SECONDS
            except OSError:
                unused = True
            if unused or directory.name.startswith(NEW):
                log.info("removing a template that is of no use any more", file=str(directory))
                _remove(directory)

    def _path(self, shape: str) -> Path:
        return self._directory / shape


def _load(directory: Path, shape: str) -> Template:
    about = msgspec.json.decode((directory / ABOUT).read_bytes(), type=_About)
    if about.shape != shape:
        raise ValueError(f"{ABOUT} is of another template")
    with (directory / STATE).open("rb") as file:
        state = file.read(LARGEST_STATE)
    if hashlib.sha256(state).hexdigest() != about.state_sha256:
        raise ValueError(f"{STATE} has changed")
    with contextlib.ExitStack() as undo:
        memory = _loaded(directory / MEMORY, about.size.memory_mib * MIB, about.memory_sha256, undo)
        scratch = _loaded(directory / SCRATCH, about.scratch_bytes, about.scratch_sha256, undo)
        undo.pop_all()
    return Template(shape, about.size, memory, scratch, state)


class _Saved(msgspec.Struct, frozen=True):
    size: int
    digest: str


def _saved(fd: int, path: Path) -> _Saved:
    """Write a memfd, which is closed, to a file; return its size and digest."""
    try:
        saved = _Saved(os.fstat(fd).st_size, memfile.digest(fd))
        with path.open("wb") as file:
            file.truncate(saved.size)
            memfile.copy(fd, file.fileno())
            os.fsync(file.fileno())
        return saved
    finally:
        os.close(fd)


def _loaded(path: Path, size: int, digest: str, undo: contextlib.ExitStack) -> int:
    """Return a sealed memfd with what a file has, which `undo` closes.

    Raises:
        ValueError: The file is not as it was written.
    """
    fd = memfile.make("template", size)
    undo.callback(os.close, fd)
    with path.open("rb") as source:
        if os.fstat(source.fileno()).st_size != size:
            raise ValueError(f"{path.name} has another length")
        memfile.copy(source.fileno(), fd)
    if memfile.digest(fd) != digest:
        raise ValueError(f"{path.name} has changed")
    memfile.seal(fd)
    return fd


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
