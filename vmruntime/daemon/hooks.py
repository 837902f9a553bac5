"""Reads the directories of OCI hooks. They are read for every container, so a change needs no restart."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import structlog

from vmruntime.daemon.trusted import check_trust, read_trusted
from vmruntime.errors import FailedPrecondition
from vmruntime.pods.oci.hooks import MANUAL, Hook, outside, parse

log = structlog.get_logger(__name__)


def load_hooks(directories: Iterable[str]) -> list[Hook]:
    """Return all hooks in the order in which they are to run: by file name, in lower case.

    Args:
        directories: Of *.json files; a file of a later one takes the place of one with the same name in an earlier one.
            A directory that does not exist has none.

    Raises:
        FailedPrecondition: A file is no hook or not to be trusted; the message names the file and the field. One bad
            file stops all: a hook that is left out may be one that something relies on.
    """
    files: dict[str, Path] = {}
    for directory in directories:
        try:
            found = [path for path in Path(directory).iterdir() if path.suffix == ".json"]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise FailedPrecondition(f"hooks_dirs: {directory} cannot be read: {error.strerror}") from error
        files.update({path.name: path for path in found})
    return [_read(files[name]) for name in sorted(files, key=lambda name: (name.lower(), name))]


def warn_of_bad_hooks(directories: Iterable[str]) -> None:
    """Say in the log that a hook cannot be used, before the first container is refused for it."""
    try:
        load_hooks(directories)
    except FailedPrecondition as error:
        log.error("no container can be created until the hooks are corrected", error=str(error))


def _read(path: Path) -> Hook:
    hook = parse(read_trusted(path, MANUAL), str(path))
    if outside(hook):
        _check_program(path, Path(hook.command.path))
    return hook


def _check_program(file: Path, program: Path) -> None:
    try:
        check_trust(program, f"hook.path: {program}", file)
        usable = program.is_file() and os.access(program, os.X_OK)
    except OSError as error:
        raise FailedPrecondition(f"{file}: hook.path: {program}: {error.strerror}", remedy=MANUAL) from error
    if not usable:
        raise FailedPrecondition(f"{file}: hook.path: {program} is not an executable file", remedy=MANUAL)
