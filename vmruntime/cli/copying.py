"""Files to and from a container: tar here, tar there, an exec between them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import posixpath
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from vmruntime.cli.client import Client
from vmruntime.cli.sessions import Ends, Sink, converse, tls_context
from vmruntime.config.settings import StreamingSettings
from vmruntime.errors import FailedPrecondition, Internal, InvalidArgument, NotFound
from vmruntime.generated import cri_pb2

_CHUNK = 256 * 1024
_NOT_FOUND = 127
_WORDS_LIMIT = 500


@dataclasses.dataclass(frozen=True)
class Place:
    """One end of a copy: a path here, or in a pod or container when `target` is not empty."""

    target: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Place:
        """Return what `POD:PATH` or a local path means; `./a:b` is local."""
        target, colon, path = text.partition(":")
        if not colon or "/" in target or not target:
            return cls("", text)
        if not path:
            raise InvalidArgument.field("path", text, "names no file", remedy="such as web:/etc/hosts")
        return cls(target, path)


class Copier:
    """Copies between this machine and one container."""

    def __init__(self, client: Client, settings: StreamingSettings, container_id: str) -> None:
        self._client = client
        self._settings = settings
        self._container_id = container_id

    def upload(self, source: Path, target: str) -> None:
        """Copy a file or directory into the container: into `target` if that is a directory, else as `target`.

        Raises:
            NotFound: `source` does not exist.
            FailedPrecondition: The container has no tar.
            Internal: One of the two tars failed; the message has its words.
        """
        if not os.path.lexists(source):
            raise NotFound(f"{source}: no such file or directory")
        name = source.absolute().name
        if self._is_directory(target):
            directory = target
        else:
            directory, name = posixpath.split(target.rstrip("/"))
        if not name:
            raise InvalidArgument.field("path", target, "names no file")
        own = source.absolute().name
        here = ["tar", "-C", str(source.absolute().parent), *_renamed(own, name), "--owner=0", "--group=0"]
        here += ["-cf", "-", "--", own]
        asyncio.run(self._run(here, ["tar", "-xf", "-", "-C", directory or "."], upload=True))

    def download(self, source: str, target: Path) -> None:
        """Copy a file or directory out of the container: into `target` if that is a directory, else as `target`.

        The archive is the container's word, so it is unpacked beside the target and only what was asked for is taken.

        Raises:
            FailedPrecondition: The container has no tar, or the target cannot be written.
            Internal: One of the two tars failed, as for a file that does not exist.
        """
        directory, name = posixpath.split(source.rstrip("/"))
        if not name or name in (".", ".."):
            raise InvalidArgument.field("path", source, "names no file")
        final = target / name if target.is_dir() else target
        try:
            private = Path(tempfile.mkdtemp(prefix=".vmruntime-cp-", dir=final.absolute().parent))
        except OSError as error:
            raise FailedPrecondition(f"{final.parent}: {error.strerror}") from error
        try:
            here = ["tar", "-C", str(private), "--no-same-owner", "-xf", "-"]
            asyncio.run(self._run(here, ["tar", "-cf", "-", "-C", directory or ".", "--", name], upload=False))
            if not os.path.lexists(private / name):
                raise Internal(f"the container's tar did not send {name}")
            _replace(private / name, final)
        finally:
            shutil.rmtree(private, ignore_errors=True)

    def _is_directory(self, path: str) -> bool:
        command = ["sh", "-c", 'test -d "$1"', "sh", path]
        request = cri_pb2.ExecSyncRequest(container_id=self._container_id, cmd=command, timeout=60)
        return path.endswith("/") or self._client.call(self._client.runtime.ExecSync, request).exit_code == 0

    async def _run(self, here: list[str], there: list[str], *, upload: bool) -> None:
        request = cri_pb2.ExecRequest(
            container_id=self._container_id, cmd=there, stdin=upload, stdout=not upload, stderr=True
        )
        url = self._client.call(self._client.runtime.Exec, request).url
        words = bytearray()

        async def note(data: bytes) -> None:
            words.extend(data[: _WORDS_LIMIT - len(words)])

        async with _tar(here, upload=upload) as (tar, stdin, stdout):
            ends = Ends(stdout=stdout, stderr=note, stdin=stdin)
            status = await converse(url, ends, tls_context(self._settings))
            said = await _end(tar)
        if status == _NOT_FOUND:
            raise FailedPrecondition("the container has no tar", remedy="copying needs one in the image")
        if status:
            raise Internal(f"tar in the container failed: {words.decode(errors='replace').strip()}")
        if tar.returncode:
            raise Internal(f"tar failed: {said}")


@contextlib.asynccontextmanager
async def _tar(
    argv: list[str], *, upload: bool
) -> AsyncIterator[tuple[asyncio.subprocess.Process, AsyncIterator[bytes] | None, Sink]]:
    """Run tar; yield it with what it says, or with where to send what it shall read."""
    stdin, stdout = (subprocess.DEVNULL, subprocess.PIPE) if upload else (subprocess.PIPE, subprocess.DEVNULL)
    try:
        tar = await asyncio.create_subprocess_exec(*argv, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise FailedPrecondition("this machine has no tar", remedy="install it") from error

    async def read() -> AsyncIterator[bytes]:
        assert tar.stdout is not None
        while data := await tar.stdout.read(_CHUNK):
            yield data

    async def write(data: bytes) -> None:
        if tar.stdin is not None:
            with contextlib.suppress(ConnectionError):  # its status says why
                tar.stdin.write(data)
                await tar.stdin.drain()

    try:
        yield tar, read() if upload else None, write
    finally:
        if tar.returncode is None:
            tar.kill()
            await tar.wait()


async def _end(tar: asyncio.subprocess.Process) -> str:
    """Wait for tar's end and return the end of what it said."""
    if tar.stdin is not None:
        tar.stdin.close()
    assert tar.stderr is not None
    words = await tar.stderr.read()
    await tar.wait()
    return words.decode(errors="replace").strip()[-_WORDS_LIMIT:]


def _replace(found: Path, final: Path) -> None:
    try:
        if final.is_dir() and not final.is_symlink():
            raise FailedPrecondition(f"{final} is a directory", remedy="remove it first, or choose another target")
        os.rename(found, final)
    except OSError as error:
        raise FailedPrecondition(f"{final}: {error.strerror}") from error


def _renamed(own: str, wanted: str) -> list[str]:
    """Return tar's option that changes the first name of each path; what symbolic links say stays (tar, 6.7)."""
    if own == wanted:
        return []
    # Between control characters, so that no other character of a name is a delimiter.
    pattern, replacement = _escaped(own, "\\.*[]^$"), _escaped(wanted, "\\&")
    return [f"--transform=flags=rhS;s\x01^{pattern}\x01{replacement}\x01"]


def _escaped(text: str, special: str) -> str:
    return "".join(f"\\{c}" if c in special else c for c in text)
