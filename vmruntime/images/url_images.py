"""VM images by URL: what their names are translated to, and their way here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import NotFound
from vmruntime.images.disks import DiskStore
from vmruntime.images.download import Downloader
from vmruntime.images.endpoint import Checksum, Endpoint
from vmruntime.images.progress import Phase, PullProgress, Report
from vmruntime.images.reference import Reference
from vmruntime.images.scratch import ScratchSpace
from vmruntime.images.seen import Seen
from vmruntime.images.shared import ToldWork
from vmruntime.images.translation import SUFFIXES, Translation, Translator, load_directory
from vmruntime.model.image import DiskImage

KEPT_SECONDS = 24 * 3600.0
"""How long half a download is kept for somebody to go on with."""

_Print = tuple[tuple[str, int, int, int], ...]


class Rules:
    """The translations of a directory, read again when its files change."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._print: _Print | None = None
        self._rules: list[Translation] = []

    async def current(self) -> list[Translation]:
        """Return the rules.

        Raises:
            FailedPrecondition: A file cannot be used; the message names it and the key.
        """
        return await in_thread(self._current)

    def _current(self) -> list[Translation]:
        found = self._fingerprint()
        if found != self._print:
            self._print = None  # a file that cannot be used is an error until it is corrected
            self._rules = load_directory(self._directory)
            self._print = found
        return self._rules

    def _fingerprint(self) -> _Print:
        try:
            paths = sorted(path for path in self._directory.iterdir() if path.suffix in SUFFIXES)
            stats = [(path.name, path.stat()) for path in paths]
        except OSError:
            return ()  # load_directory() says what is wrong
        return tuple((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats)


class UrlImages:
    """Fetches VM images."""

    def __init__(
        self, translations: Path, downloads: Path, incoming: ScratchSpace, homes: ScratchSpace, disks: DiskStore
    ) -> None:
        """Read nothing yet.

        Args:
            translations: Directory of translation files.
            downloads: For what has arrived in part.
            incoming: For what is whole but not checked; a single file system with `downloads` and `disks`.
            homes: For keys of client certificates; on a tmpfs.
            disks: Where disks go.
        """
        self._rules = Rules(translations)
        self._downloader = Downloader(downloads, homes)
        self._seen = Seen(downloads)
        self._incoming = incoming
        self._disks = disks
        self._fetching: ToldWork[tuple[Endpoint, str], DiskImage, tuple[int, int | None]] = ToldWork()

    async def knows(self, name: str) -> bool:
        """Whether a rule says where the image of a name is; see Translator.translate().

        Raises:
            FailedPrecondition: A translation file cannot be used.
        """
        try:
            Translator(await self._rules.current(), default_scheme="").translate(name)
        except NotFound:
            return False
        return True

    async def pull(
        self, reference: Reference, owner: str, report: Report, endpoint: Endpoint | None = None
    ) -> DiskImage:
        """Fetch the disk of virtlet.cloud/NAME, unless its digest says that it is here.

        Callers for one place share one download.

        Args:
            reference: Its digest, if any, has to be the file's.
            owner: Under which the disk is held; the caller releases it.
            report: Told how far it is.
            endpoint: Where it is, whatever its name; None: where the translations say.

        Raises:
            VmruntimeError: See Rules.current, Translator.translate, Downloader.fetch and DiskStore.add.
        """
        report(PullProgress(reference=str(reference), phase=Phase.RESOLVING))
        if endpoint is None:
            endpoint = Translator(await self._rules.current()).translate(reference.path)
        known = reference.digest or (str(endpoint.checksum) if endpoint.checksum else "")
        self._disks.hold(owner, known)  # none is called by SHA-512, or by nothing
        if ready := self._disks.get(known):
            return ready

        def heard(bytes_: tuple[int, int | None]) -> None:
            done, total = bytes_
            report(PullProgress(reference=str(reference), phase=Phase.DOWNLOADING, done=done, total=total or 0))

        while True:
            disk = await self._fetching.join(
                (endpoint, reference.digest), lambda tell: self._fetch(endpoint, reference, tell), heard
            )
            self._disks.hold(owner, disk.digest)
            if self._disks.get(disk.digest):  # and not collected between its end and the hold
                return disk

    async def sweep(self) -> None:
        """Remove halves of downloads that nobody has gone on with."""
        await self._downloader.sweep(KEPT_SECONDS)
        await in_thread(lambda: self._seen.sweep(lambda digest: self._disks.get(digest) is not None))

    async def _fetch(
        self, endpoint: Endpoint, reference: Reference, tell: Callable[[tuple[int, int | None]], None]
    ) -> DiskImage:
        checksums = [Checksum.parse(reference.digest)] if reference.digest else []
        place = f"{endpoint.url} {endpoint.checksum or ''} {reference.digest}"
        if (unchanged := await self._unchanged(endpoint, place)) is not None:
            return unchanged
        async with self._incoming.directory() as work:
            file = work / "disk"
            fetched = await self._downloader.fetch(
                endpoint,
                file,
                limit=self._disks.max_file_size,
                checksums=checksums,
                progress=lambda done, total: tell((done, total)),
            )
            disk = await self._disks.add(file, fetched.digest, str(reference), endpoint.format)
        await in_thread(lambda: self._seen.put(place, fetched.digest, fetched.head))
        return disk

    async def _unchanged(self, endpoint: Endpoint, place: str) -> DiskImage | None:
        """Return the disk that came from a place, where the server says that it has not changed since."""
        sight = await in_thread(lambda: self._seen.get(place))
        disk = self._disks.get(sight.digest) if sight is not None else None
        if sight is None or disk is None or (endpoint.format and endpoint.format.value != disk.format):
            return None
        return disk if sight.still(await self._downloader.ask(endpoint)) else None
