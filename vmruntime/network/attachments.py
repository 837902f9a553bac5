"""Pods' attachments to networks, kept on disk: what DEL needs, whatever has changed since ADD."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from vmruntime import tracing
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import ResourceExhausted
from vmruntime.network.conf import NetworkConf
from vmruntime.network.errors import NetworkError

log = structlog.get_logger(__name__)

NEW = ".new"


class Attachment(msgspec.Struct, kw_only=True):
    """One pod's attachment to a network.

    Attributes:
        container_id: The sandbox's id.
        netns: Path of the pod's network namespace.
        ifname: Name of the pod's first interface.
        conf: The network as it was when the pod was made.
        args: CNI_ARGS as key=value;….
        capabilities: Capability arguments by name, such as portMappings.
        result: What ADD answered; None until it did.
    """

    container_id: str
    netns: str
    ifname: str
    conf: NetworkConf
    args: str
    capabilities: dict[str, Any]
    result: dict[str, Any] | None = None


class Attachments:
    """A directory with a file for each attachment: ID.json, and ID.lock for turn.py."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def lock(self, sandbox_id: str) -> Path:
        """Return a sandbox's lock file."""
        return self._directory / f"{sandbox_id}.lock"

    @tracing.timed("network.record")
    async def save(self, attachment: Attachment, *, on_disk: bool = True) -> None:
        """Write an attachment: the next daemon finds the old one or the new one.

        Args:
            attachment: The new one.
            on_disk: Also after a crash of the host; otherwise that is so when keep() has returned.

        Raises:
            NetworkError: The disk does not take it.
        """
        content = msgspec.json.encode(attachment)
        path = self._path(attachment.container_id)

        def write() -> None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_suffix(NEW)
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                if on_disk:
                    os.fsync(file.fileno())
            temporary.replace(path)

        await _on_disk(path, write)

    @tracing.timed("network.sync")
    async def keep(self, sandbox_id: str) -> None:
        """Wait until a new attachment is on the disk, with its name.

        Raises:
            NetworkError: The disk does not take it.
        """
        path = self._path(sandbox_id)

        def sync() -> None:
            for one in (path, path.parent):
                descriptor = os.open(one, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

        await _on_disk(path, sync)

    async def load(self, sandbox_id: str) -> Attachment | None:
        """Return a sandbox's attachment; None: it has none, or it cannot be read."""
        return await in_thread(lambda: self._read(self._path(sandbox_id)))

    async def all(self) -> tuple[list[Attachment], set[str]]:
        """Return every attachment that can be read, by sandbox id, and the ids of those that cannot."""

        def read() -> tuple[list[Attachment], set[str]]:
            found, unreadable = [], set()
            for path in sorted(self._directory.glob("*.json")):
                attachment = self._read(path)
                if attachment is not None:
                    found.append(attachment)
                elif path.exists():
                    unreadable.add(path.stem)
            return found, unreadable

        return await in_thread(read)

    async def forget(self, sandbox_id: str) -> None:
        """Remove everything of a sandbox; nothing there: success."""
        path = self._path(sandbox_id)
        # The lock last: who comes next waits for it. The half-written one is a killed daemon's.
        files = (path.with_suffix(NEW), path, self.lock(sandbox_id))

        def remove() -> None:
            for file in files:
                file.unlink(missing_ok=True)

        await in_thread(remove)

    def _path(self, sandbox_id: str) -> Path:
        return self._directory / f"{sandbox_id}.json"

    def _read(self, path: Path) -> Attachment | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Attachment)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            log.error("CNI cache unreadable", file=str(path), error=str(error))
            return None


async def _on_disk(path: Path, function: Callable[[], None]) -> None:
    try:
        await in_thread(function)
    except OSError as error:
        raise NetworkError(
            f"{path} cannot be written: {error.strerror}",
            remedy="make room or mend the file system",
            code=ResourceExhausted.code,
        ) from error
