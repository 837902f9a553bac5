"""A file that is arriving: its bytes so far, what the server said of them, and a lock.

KEY.part    the bytes; locked by flock(2) while somebody works at it
KEY.head    HTTP heads of the answer whose body begins the part
KEY.again   heads of an answer that goes on with it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from vmruntime.aio.pipeline import in_thread
from vmruntime.images import http_head
from vmruntime.images.endpoint import Checksum
from vmruntime.images.http_head import Head

_HASHED_AT_ONCE = 64 * 1024 * 1024


class Part:
    """One file that is arriving. Everything but digests() blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heads = path.with_suffix(".head")
        self.again = path.with_suffix(".again")

    @classmethod
    def of(cls, directory: Path, url: str) -> Part:
        """Return the part of a URL's content."""
        return cls(directory / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.part")

    @property
    def size(self) -> int:
        """Bytes so far."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def begun(self) -> Head | None:
        """Return what the server said when it began; None: nothing that is known."""
        return http_head.read(self.heads)

    def gone_on(self) -> Head | None:
        """Return what the server said when it was asked for the rest, once."""
        head = http_head.read(self.again)
        self.again.unlink(missing_ok=True)
        return head

    def discard(self) -> None:
        """Begin again; the file stays, since the lock is on it."""
        self.heads.unlink(missing_ok=True)
        self.again.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.path, 0)

    def settle(self, target: Path) -> int:
        """Put the whole file in its place, on the disk and in one step; return its size."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        self.path.replace(target)
        self.heads.unlink(missing_ok=True)
        return size

    async def digests(self, checksums: Sequence[Checksum]) -> tuple[str, list[Checksum]]:
        """Return the SHA-256 digest, and for each checksum what it should be."""
        own = hashlib.sha256()
        hashers = [checksum.hasher() for checksum in checksums]
        descriptor = await in_thread(lambda: os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            while await in_thread(lambda: _hash(descriptor, [own, *hashers])):
                pass
        finally:
            os.close(descriptor)
        found = [Checksum(each.algorithm, hasher.hexdigest()) for each, hasher in zip(checksums, hashers, strict=True)]
        return f"sha256:{own.hexdigest()}", found

    def lock(self) -> int | None:
        """Return a descriptor that holds the lock; None: somebody else does."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been put in its place in between: then the lock is on a finished file.
            if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[bool]:
        """Hold the lock while the block runs; False: somebody else does. Of an empty part nothing stays."""
        descriptor = await in_thread(self.lock)
        if descriptor is None:
            yield False
            return
        try:
            yield True
        finally:
            await in_thread(lambda: self._unlock(descriptor))

    def remove(self) -> bool:
        """Remove it, unless somebody works at it."""
        descriptor = self.lock()
        if descriptor is None:
            return False
        self.discard()
        self._unlock(descriptor)
        return True

    def _unlock(self, descriptor: int) -> None:
        try:
            if os.fstat(descriptor).st_size == 0:
                self.discard()
                self.path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _hash(descriptor: int, hashers: Sequence[hashlib._Hash]) -> bool:
    """Feed some of a file; False at its end. In pieces, so that a caller who is cancelled need not wait for all of it."""
    for _ in range(_HASHED_AT_ONCE // (1024 * 1024)):
        block = os.read(descriptor, 1024 * 1024)
        if not block:
            return False
        for hasher in hashers:
            hasher.update(block)
    return True
