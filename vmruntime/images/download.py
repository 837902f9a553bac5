"""Downloads of disk images: gone on with where they stopped, checked, and in place only when they are whole."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmruntime.aio.beside import beside
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import Aborted, DeadlineExceeded, FailedPrecondition, NotFound, ResourceExhausted, VmruntimeError
from vmruntime.images import curl, http_head
from vmruntime.images.curl import Transfer
from vmruntime.images.endpoint import Checksum, Endpoint, redacted
from vmruntime.images.http_head import Head
from vmruntime.images.manifest import BadImage
from vmruntime.images.part import Part
from vmruntime.images.scratch import ScratchSpace

BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts of which none got anything; one that did begins again."""

PIECES = 200
"""Most attempts in all: a server that sends a byte at a time is not to be asked for ever."""

RESTARTS = 2
POLL = 0.5

Progress = Callable[[int, int | None], None]
"""Told bytes that are here, and bytes in all when that is known."""


@dataclasses.dataclass(frozen=True)
class Downloaded:
    """A file that is in its place.

    Attributes:
        digest: "sha256:…" of its content.
        head: What the server said of it; None: nothing, or it is no server's.
    """

    size: int
    digest: str
    head: Head | None = dataclasses.field(default=None, compare=False)


class Downloader:
    """Fetches files by URL."""

    def __init__(self, directory: Path, homes: ScratchSpace) -> None:
        """Make nothing yet.

        Args:
            directory: For what has arrived in part; on the file system of the targets, and for nothing else.
            homes: For keys of client certificates; on a tmpfs.
        """
        self._directory = directory
        self._homes = homes

    async def fetch(
        self,
        endpoint: Endpoint,
        target: Path,
        *,
        limit: int,
        checksums: Sequence[Checksum] = (),
        progress: Progress | None = None,
    ) -> Downloaded:
        """Fetch a file, or the rest of it when an earlier attempt was interrupted.

        Args:
            endpoint: Where it is, with its own checksum perhaps.
            target: Replaced in one step when the file is whole.
            limit: Most bytes.
            checksums: More digests it has to have.
            progress: Called now and then.

        Raises:
            BadImage: It has not the checksum, or the server sends parts that do not belong together.
            NotFound, PermissionDenied, FailedPrecondition: The server, or the file's place, says so.
            RegistryUnavailable: The server cannot be reached, or does not go on.
            DeadlineExceeded: It took longer than the transport's time-out; what arrived is kept.
            ResourceExhausted: It is larger than `limit`, or the disk is full.
            Aborted: Somebody else is fetching it.
        """
        wanted = [*checksums, *([endpoint.checksum] if endpoint.checksum else [])]
        part = Part.of(self._directory, endpoint.url)
        try:
            await in_thread(lambda: self._directory.mkdir(mode=0o700, parents=True, exist_ok=True))
            if urlsplit(endpoint.url).scheme == "file":
                await in_thread(lambda: _check_local(endpoint, limit))
            async with part.locked() as ours, self._homes.directory() as home:
                if not ours:
                    raise Aborted(f"{redacted(endpoint.url)}: is being fetched already", remedy="try again later")
                tls = await in_thread(lambda: curl.write_tls(home, endpoint.transport.tls))
                return await _Download(endpoint, part, tls, limit, wanted, progress).run(target)
        except OSError as error:
            raise _disk_error(endpoint, error) from error

    async def ask(self, endpoint: Endpoint) -> Head | None:
        """Return what a server says of a file without sending it; None: it cannot be asked."""
        if urlsplit(endpoint.url).scheme == "file":
            return None
        try:
            async with self._homes.directory() as home:
                tls = await in_thread(lambda: curl.write_tls(home, endpoint.transport.tls))
                await curl.ask(endpoint, home / "heads", tls=tls)
                return await in_thread(lambda: http_head.read(home / "heads"))
        except (OSError, VmruntimeError):
            return None  # the download says what is wrong

    async def sweep(self, older_than: float) -> int:
        """Remove what nobody has gone on with for so many seconds, and return how many files that were."""
        return await in_thread(lambda: _sweep(self._directory, time.time() - older_than))


class _Download:
    """One call of fetch()."""

    def __init__(
        self,
        endpoint: Endpoint,
        part: Part,
        tls: curl.TlsFiles,
        limit: int,
        wanted: Sequence[Checksum],
        progress: Progress | None,
    ) -> None:
        self._endpoint = endpoint
        self._part = part
        self._tls = tls
        self._limit = limit
        self._wanted = wanted
        self._progress = progress
        self._total: int | None = None
        self._pieces = 0
        self._restarts = 0
        self._shown = redacted(endpoint.url)
        timeout = endpoint.transport.timeout
        self._deadline = asyncio.get_running_loop().time() + timeout if timeout else None

    async def run(self, target: Path) -> Downloaded:
        while True:
            whole_at_once = await self._complete()
            digest, found = await self._part.digests(self._wanted)
            wrong = [(is_, should) for is_, should in zip(found, self._wanted, strict=True) if is_ != should]
            if not wrong:
                head = await in_thread(self._part.begun)
                size = await in_thread(lambda: self._part.settle(target))
                return Downloaded(size, digest, head)
            refusal = BadImage(
                f"{self._shown}: has the checksum {wrong[0][0]}, not {wrong[0][1]}",
                remedy="correct the checksum, or find out who changed the file",
            )
            if whole_at_once:
                await in_thread(self._part.discard)
                raise refusal
            # Pieces of two files, perhaps: not every server knows If-Range.
            await self._restart(refusal)

    async def _complete(self) -> bool:
        """Run curl until the file is whole; return whether it came in one piece."""
        idle, pieces = 0, 0
        while True:
            offset, head = await in_thread(self._resume_point)
            if head is not None and offset == head.total:
                return False  # whole, but not in its place: a daemon ended between the two
            found, in_order = await self._attempt(offset, head)
            size = await in_thread(lambda: self._part.size)
            pieces += 1
            if found.code == curl.OK and found.status in (0, 200, 206):
                if in_order and (self._total is None or size == self._total):
                    return pieces == 1 and offset == 0
                in_order = in_order and (self._total is None or size < self._total)
            elif not found.transient and not (offset and _cannot_go_on(found)):
                await in_thread(self._part.discard)
                raise curl.problem(found, self._endpoint, self._limit, size)
            if not in_order or _cannot_go_on(found):
                await self._restart(
                    BadImage(
                        f"{self._shown}: the server does not send what it is asked for, or sends another file each time",
                        remedy="try again later, or use another server",
                    )
                )
            idle = 0 if size > offset else idle + 1
            if idle > len(BACKOFF):
                raise curl.problem(found, self._endpoint, self._limit, size)
            await asyncio.sleep(BACKOFF[idle - 1] if idle else 0)

    async def _restart(self, refusal: BadImage) -> None:
        await in_thread(self._part.discard)
        self._total = None
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise refusal

    async def _attempt(self, offset: int, head: Head | None) -> tuple[Transfer, bool]:
        """Run curl once; return what came of it, and whether the server sent the bytes that belong at this place."""
        heads = self._part.again if offset else self._part.heads
        if not offset:
            await in_thread(self._part.discard)
        self._pieces += 1
        if self._pieces > PIECES:
            raise BadImage(f"{self._shown}: has not arrived in {PIECES} pieces", remedy="use another server")
        try:
            async with self._reporting():
                found = await curl.transfer(
                    self._endpoint,
                    self._part.path,
                    heads,
                    limit=self._limit,
                    tls=self._tls,
                    offset=offset,
                    if_range=head.validator if head else "",
                    timeout=self._time_left(),
                )
        except DeadlineExceeded:
            raise curl.time_is_up(self._endpoint) from None
        if not offset:
            said = await in_thread(self._part.begun)
            self._total = said.total if said else None
            return found, said is None or said.status != 206
        said = await in_thread(self._part.gone_on)
        if said is None or said.status >= 400:
            return found, True  # no answer, or a refusal: the part is as it was
        same = said.total is None or self._total is None or said.total == self._total
        self._total = self._total or said.total
        return found, said.status == 206 and said.start == offset and same

    def _time_left(self) -> float:
        if self._deadline is None:
            return curl.NO_DEADLINE
        left = self._deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded("the time is up")
        return left

    def _resume_point(self) -> tuple[int, Head | None]:
        """Return how many bytes can be kept, and what the server said of them."""
        size, head = self._part.size, self._part.begun()
        if size == 0 or head is None or head.status != 200 or not head.ranges:
            return 0, None
        # Without a validator only a checksum tells whether the rest is of the same file.
        if (head.total is not None and size > head.total) or not (head.validator or self._wanted):
            return 0, None
        self._total = head.total
        return size, head

    def _reporting(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext() if self._progress is None else beside(self._report(self._progress))

    async def _report(self, report: Progress) -> None:
        while True:
            await asyncio.sleep(POLL)
            size = await in_thread(lambda: self._part.size)
            if self._total is None:  # known as soon as there is a byte
                head = await in_thread(self._part.begun)
                self._total = head.total if head is not None and head.status == 200 else None
            report(size, self._total)


def _cannot_go_on(found: Transfer) -> bool:
    """Whether the server has no bytes from there on, or another file now."""
    return found.code == curl.RANGE_ERROR or (found.code == curl.HTTP_ERROR and found.status in (412, 416))


def _check_local(endpoint: Endpoint, limit: int) -> None:
    path = Path(unquote(urlsplit(endpoint.url).path))
    if not path.exists():
        raise NotFound(f"{endpoint.url}: there is no such file", remedy="correct the URL, or put the file there")
    if not path.is_file():
        raise FailedPrecondition(f"{endpoint.url}: is not a file", remedy="correct the URL")
    size = path.stat().st_size
    if size > limit:
        raise ResourceExhausted(f"{endpoint.url}: has {size} bytes; {limit} are allowed", remedy="raise the limit")


def _sweep(directory: Path, before: float) -> int:
    removed = 0
    for path in sorted(directory.glob("*.part")):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                removed += Part(path).remove()
    return removed


def _disk_error(endpoint: Endpoint, error: OSError) -> ResourceExhausted | FailedPrecondition:
    words = f"{redacted(endpoint.url)}: cannot be kept: {error.strerror} ({error.filename})"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(words, remedy="free space there")
    return FailedPrecondition(words)
