"""The machine as the checks see it; tests give them another one."""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
import resource
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAM_TIMEOUT = 10.0


@dataclasses.dataclass(frozen=True)
class Account:
    """A user with the groups it is in."""

    name: str
    uid: int
    groups: frozenset[int]

    def may(self, status: os.stat_result, bits: int) -> bool:
        """Whether permission bits (4 read, 2 write, 1 execute or traverse) hold for this account."""
        if self.uid == 0:
            return True
        if status.st_uid == self.uid:
            return (status.st_mode >> 6) & bits == bits
        if status.st_gid in self.groups:
            return (status.st_mode >> 3) & bits == bits
        return status.st_mode & bits == bits


def _which(name: str) -> str | None:
    # sbin is not on every PATH, and the daemon's PATH has it.
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"))
    return shutil.which(name, path=path)


def _run(argv: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROGRAM_TIMEOUT, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def _open_device(path: Path) -> str:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _account(name: str) -> Account | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    groups = {group.gr_gid for group in grp.getgrall() if name in group.gr_mem}
    return Account(name, entry.pw_uid, frozenset(groups | {entry.pw_gid}))


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


@dataclasses.dataclass(frozen=True)
class Host:
    """Ways to ask a machine.

    Attributes:
        root: Where its file system begins.
        which: Path of a program, None when it is not installed.
        run: Output of a program, None when it failed.
        open_device: Why a device cannot be opened for reading and writing, empty when it can.
        account: A user by name.
        free_bytes: Space left on a path's file system.
        euid: Who we are.
        open_files: Limit on open files.
    """

    root: Path = Path("/")
    which: Callable[[str], str | None] = _which
    run: Callable[[Sequence[str]], str | None] = _run
    open_device: Callable[[Path], str] = _open_device
    account: Callable[[str], Account | None] = _account
    free_bytes: Callable[[Path], int] = _free_bytes
    euid: int = dataclasses.field(default_factory=os.geteuid)
    open_files: int = dataclasses.field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    machine: str = dataclasses.field(default_factory=lambda: os.uname().machine)

    def path(self, absolute: str | Path) -> Path:
        """Return where an absolute path of the machine is."""
        return self.root / str(absolute).lstrip("/")

    def read(self, absolute: str | Path) -> str | None:
        """Return a text file, None when it cannot be read."""
        try:
            return self.path(absolute).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def nearest(self, absolute: str | Path) -> Path:
        """Return the nearest directory at or above a path that exists."""
        path = self.path(absolute)
        while not path.exists() and path != self.root:
            path = path.parent
        return path
