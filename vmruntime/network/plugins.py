"""One run of one CNI plugin: a program whose request is JSON on stdin and CNI_* in the environment.

A plugin is a program the administrator chose, not one of ours: it may hang, crash, or print whatever it likes.
Whatever it does becomes a NetworkError that names network, file, plugin and command.
Source: the CNI specification 1.1.0, sections 2 (execution protocol) and 5 (result types).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from vmruntime.aio.process import Completed, last_lines, run
from vmruntime.errors import Code, VmruntimeError
from vmruntime.network.conf import SUPPORTED_VERSIONS
from vmruntime.network.errors import NetworkError

log = structlog.get_logger(__name__)

ANSWER_LIMIT = 1024 * 1024
"""Bytes of an answer; the largest networks need a few KiB."""

QUICK_SECONDS = 10.0

WORDS_LIMIT = 1000
"""Characters of a plugin's own words in one of our messages."""


class _Failure(msgspec.Struct):
    """What a plugin prints when it fails."""

    code: int = 0
    msg: str = ""
    details: str = ""


class _Versions(msgspec.Struct):
    """What VERSION answers."""

    supportedVersions: list[str]


class Plugins:
    """The installed plugins."""

    def __init__(self, bin_dirs: Sequence[str], timeout: float) -> None:
        self._bin_dirs = list(bin_dirs)
        self._timeout = timeout
        self._versions: dict[tuple[object, ...], frozenset[str] | None] = {}

    def find(self, names: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
        """Return the path of each program and the names of those that no directory has; see find_programs()."""
        return find_programs(names, self._bin_dirs)

    async def versions(self, name: str) -> frozenset[str] | None:
        """Return the protocol's versions that an installed plugin says it speaks; None: it does not say.

        A plugin is asked once, and again when its file has changed.

        Raises:
            NetworkError: It does not answer in time.
        """
        path = self.find([name])[0].get(name)
        if path is None:
            return None
        stat = path.stat()
        key = (path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._versions:
            self._versions[key] = await self._ask_versions(name)
        return self._versions[key]

    async def _ask_versions(self, name: str) -> frozenset[str] | None:
        # The oldest plugins want every variable, whatever the command.
        dummies = {f"CNI_{key}": "dummy" for key in ("CONTAINERID", "NETNS", "IFNAME")}
        request = {"cniVersion": SUPPORTED_VERSIONS[-1]}
        try:
            printed = await self.run(name, "VERSION", request, dummies, where="CNI", timeout=self.quick)
        except NetworkError as error:
            if error.code is Code.DEADLINE_EXCEEDED:
                raise
            # Its ADD may work all the same; if not, that says why.
            log.info("CNI plugin does not tell its versions", plugin=name, error=words(str(error)))
            return None
        return spoken_versions(printed)

    @property
    def quick(self) -> float:
        """Seconds for commands that only look: nobody wants to wait for a status as long as for an address."""
        return min(self._timeout, QUICK_SECONDS)

    async def run(
        self,
        name: str,
        command: str,
        request: Mapping[str, Any],
        variables: Mapping[str, str],
        *,
        where: str,
        lock: int | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Run a plugin and return what it printed.

        Args:
            name: The program's.
            command: ADD, DEL, CHECK, GC, STATUS or VERSION.
            request: Goes to its stdin.
            variables: CNI_* besides CNI_COMMAND and CNI_PATH.
            where: Network and file, for errors.
            lock: A descriptor to inherit; see turn.py.
            timeout: Seconds; None: network.plugin_timeout.

        Raises:
            NetworkError: It is not installed, failed, or took too long.
        """
        program = self.find([name])[0].get(name)
        if program is None:
            raise NetworkError(
                f"{where}: the plugin {name!r} is in none of {', '.join(self._bin_dirs)}",
                remedy="install containernetworking-plugins, or set network.bin_dirs",
            )
        what = f"{where}: {name} {command} failed"
        environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "CNI_COMMAND": command,
            "CNI_PATH": ":".join(self._bin_dirs),
            **variables,
        }
        try:
            done = await run(
                [str(program)],
                input=msgspec.json.encode(request),
                env=environment,
                timeout=timeout or self._timeout,
                output_limit=ANSWER_LIMIT,
                pass_fds=() if lock is None else (lock,),
                awaited=True,
            )
        except VmruntimeError as error:
            late = error.code is Code.DEADLINE_EXCEEDED
            remedy = "see what it waits for, or raise network.plugin_timeout" if late else error.remedy
            raise NetworkError(f"{what}: {error.message}", remedy=remedy, code=error.code) from error
        except OSError as error:  # there and executable, but not a program
            raise NetworkError(f"{what}: {program} cannot be run: {error.strerror}") from error
        except (RecursionError, OverflowError, ValueError) as error:
            raise NetworkError(f"{what}: its request cannot be written: {error}") from error
        if done.returncode != 0:
            raise _failure(what, done)
        return done.stdout


def answer(printed: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object that a plugin printed; `what` names the plugin and the network.

    Raises:
        NetworkError: It printed something else.
    """
    if not printed.strip():
        raise NetworkError(f"{what} answered nothing")
    try:
        decoded = msgspec.json.decode(printed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NetworkError(f"{what} answered no JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise NetworkError(f"{what} answered no JSON object")
    return decoded


def spoken_versions(printed: bytes) -> frozenset[str] | None:
    """Return what an answer to VERSION says; None: nothing that is understood."""
    try:
        return frozenset(msgspec.json.decode(printed, type=_Versions).supportedVersions)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def find_programs(names: Sequence[str], bin_dirs: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """Return the path of each plugin program and the names of those that no directory has."""
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for name in names:
        candidates = (Path(directory) / name for directory in bin_dirs)
        program = next((path for path in candidates if _executable(path)), None)
        if program is None:
            missing.append(name)
        else:
            paths[name] = program
    return paths, missing


def words(text: str) -> str:
    """Return what a plugin said as one line of reasonable length, without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= WORDS_LIMIT else line[:WORDS_LIMIT] + "…"


def _executable(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_mode & 0o111 != 0
    except OSError:
        return False


def _failure(what: str, done: Completed) -> NetworkError:
    """Return the plugin's own error, or what it said instead of one."""
    try:
        error = msgspec.json.decode(done.stdout, type=_Failure)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        error = _Failure()
    text = words(f"{error.msg} {error.details}")
    if not text:
        text = words(last_lines(done.stderr)) or words(done.stdout[:WORDS_LIMIT].decode(errors="replace"))
    status = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return NetworkError(f"{what}: {text or f'{status}, and it said nothing'}", cni_code=error.code)
