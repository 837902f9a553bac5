"""Templates on disk: a later daemon need not boot one. What is read is checked, and then kept in memory of our own.

A template is a directory named after its shape, with `memory` (sparse), `state` and `template.json`.
"""

from __future__ import annotations

import contextlib
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
from vmruntime.sandboxes.sources.template import MIB, Template

log = structlog.get_logger(__name__)

ABOUT, MEMORY, STATE = "template.json", "memory", "state"
NEW = "new-"
UNUSED_SECONDS = 7 * 24 * 3600.0
LARGEST_STATE = 64 * MIB


class _About(msgspec.Struct, frozen=True, kw_only=True):
    """What template.json says; memory_sha256 is memfile.digest()'s."""

    shape: str
    size: VmSize
    memory_sha256: str
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
        self.note_use(shape)
        return template

    def save(self, template: Template) -> None:
        """Write a template: all of it or nothing.

        Raises:
            OSError: The disk does not take it; nothing stays.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = self._directory / f"{NEW}{template.shape}"
        _remove(directory)
        directory.mkdir(mode=0o700)
        try:
            memory = template.memory()
            try:
                digest = memfile.digest(memory)
                with (directory / MEMORY).open("wb") as file:
                    file.truncate(template.size.memory_mib * MIB)
                    memfile.copy(memory, file.fileno())
                    os.fsync(file.fileno())
            finally:
                os.close(memory)
            (directory / STATE).write_bytes(template.state)
            about = _About(
                shape=template.shape,
                size=template.size,
                memory_sha256=digest,
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
    fd = memfile.make("template", about.size.memory_mib * MIB)
    try:
        with (directory / MEMORY).open("rb") as source:
            if os.fstat(source.fileno()).st_size != about.size.memory_mib * MIB:
                raise ValueError(f"{MEMORY} has another length")
            memfile.copy(source.fileno(), fd)
        if memfile.digest(fd) != about.memory_sha256:
            raise ValueError(f"{MEMORY} has changed")
        memfile.seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return Template(shape, about.size, fd, state)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
