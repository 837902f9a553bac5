"""The archive of `vmruntime diag`, and how things get into it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import stat
import subprocess
import tarfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from vmruntime.cli.doctor.host import Host
from vmruntime.errors import AlreadyExists, PermissionDenied, VmruntimeError

LOG_LIMIT = 1024 * 1024
"""Bytes of a log: its end."""

OUTPUT_LIMIT = 1024 * 1024
PROGRAM_TIMEOUT = 20.0


class Bundle:
    """An archive that is being written; nothing that is wrong with one part keeps the others out.

    Attributes:
        tools: This machine.
        errors: What could not be found out, a line each.
    """

    def __init__(self, path: Path, tools: Host) -> None:
        """Make the file, which nobody else may read.

        Raises:
            AlreadyExists: There is one of that name.
            PermissionDenied: It cannot be made.
        """
        self.tools = tools
        self.errors: list[str] = []
        self._path = path
        self._root = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise AlreadyExists(f"{path} exists already", remedy="give another name with -o") from None
        except OSError as error:
            raise PermissionDenied(f"{path} cannot be written: {error.strerror}", remedy="choose with -o") from None
        self._file = os.fdopen(descriptor, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w:gz")  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        with self._file:
            self._tar.close()
        if error is not None:
            self._path.unlink(missing_ok=True)

    def note(self, what: str, why: str) -> None:
        """Note that something could not be found out."""
        self.errors.append(f"{what}: {' '.join(why.split())}")

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Note what goes wrong in the block rather than end with it."""
        try:
            yield
        except VmruntimeError as error:
            self.note(what, error.message)
        except OSError as error:
            self.note(what, error.strerror or str(error))

    def text(self, name: str, content: str | bytes) -> None:
        """Add a text."""
        data = content if isinstance(content, bytes) else content.encode(errors="surrogateescape")
        member = tarfile.TarInfo(f"{self._root}/{name}")
        member.size = len(data)
        member.mtime = int(time.time())
        member.mode = 0o600
        self._tar.addfile(member, io.BytesIO(data))

    def json(self, name: str, value: object) -> None:
        """Add a value."""
        self.text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def file(self, name: str, path: Path) -> None:
        """Add the end of a file. A VM's account may write where it is: links are not followed, nor pipes waited for."""
        with self.trying(str(path)):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    self.note(str(path), "is not a file")
                    return
                file.seek(max(0, status.st_size - LOG_LIMIT))
                self.text(name, file.read(LOG_LIMIT).lstrip(b"\0"))

    def output(self, name: str, *commands: Sequence[str]) -> None:
        """Add what programs say, with their command lines; a program that is not installed is noted."""
        parts = []
        for command in commands:
            path = self.tools.which(command[0])
            if path is None:
                self.note(name, f"{command[0]} is not installed")
                continue
            parts.append(f"$ {shlex.join(command)}\n{_said([path, *command[1:]])}")
        if parts:
            self.text(name, "\n".join(parts))


def _said(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROGRAM_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({error})\n"
    said = done.stdout[:OUTPUT_LIMIT].decode(errors="replace")
    return said if done.returncode == 0 else f"{said}(exit status {done.returncode})\n"
