"""VM images by URL in the service, from a web server on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.unit.images.web import Request, Send, Web, head, serve_file, web
from vmruntime.clock import SystemClock
from vmruntime.config.settings import ImageSettings
from vmruntime.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from vmruntime.images import download
from vmruntime.images.disk_header import BadDisk
from vmruntime.images.manifest import BadImage
from vmruntime.images.progress import Phase, PullProgress
from vmruntime.images.service import ImageService
from vmruntime.images.skopeo_errors import RegistryUnavailable
from vmruntime.images.url_images import KEPT_SECONDS
from vmruntime.model.image import Image
from vmruntime.paths import Paths
from vmruntime.store.database import Database

MIB = 1024 * 1024
GIB = 1024 * MIB


def qcow2(path: Path, size: str, *options: str) -> bytes:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size], check=True)
    return path.read_bytes()


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Bed:
    """A service, a web server whose files can be changed, and a translation file.

    Attributes:
        files: Contents by path.
        images_used, disks_used: What containers have.
    """

    def __init__(self, root: Path, server: Web, files: dict[str, bytes]) -> None:
        self.root = root
        self.server = server
        self.files = files
        self.paths = Paths(root / "lib", root / "run")
        self.images_used: set[str] = set()
        self.disks_used: set[str] = set()
        self.rules = root / "images.d" / "rules.yaml"
        self.rules.parent.mkdir()
        self.translate(f"- {{name: small, url: '{server.url('/small')}'}}")

    def translate(self, *rules: str) -> None:
        self.rules.write_text("translations:\n" + "\n".join(rules) + "\n")
        # The next write may come within one tick of the file system's clock.
        os.utime(self.rules, ns=(0, time.time_ns()))

    @asynccontextmanager
    async def service(self, **settings: object) -> AsyncIterator[ImageService]:
        database = await Database.open(self.paths.database)
        merged = {
            "registries_conf": str(self.root / "none"),
            "translations_dir": str(self.rules.parent),
            "max_disk_gib": 10,
            **settings,
        }
        try:
            service = ImageService(
                self.paths,
                database,
                ImageSettings(**merged),  # type: ignore[arg-type]
                SystemClock(),
                images_in_use=lambda: self.images_used,
                disks_in_use=lambda: self.disks_used,
            )
            await service.load()
            yield service
        finally:
            await database.close()

    def disks(self) -> list[str]:
        return sorted(path.name for path in self.paths.disks.iterdir())

    def leftovers(self) -> list[Path]:
        places = (self.paths.incoming, self.paths.downloads, self.paths.run / "pulls")
        listed = [path for place in places if place.exists() for path in place.iterdir()]
        return [path for path in listed if path.suffix != ".seen"]


@pytest.fixture(autouse=True)
def direct_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", (0.01, 0.01))
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    files = {"/small": qcow2(tmp_path / "small", "1G"), "/other": qcow2(tmp_path / "other", "2G")}

    async def answer(request: Request, send: Send) -> None:
        content = files.get(request.target)
        if content is None:
            await send(head(404, Content_Length=0))
        else:
            await serve_file(request, send, content, etag=f'"{digest(content)}"')

    async with web(answer) as server:
        yield Bed(tmp_path, server, files)


async def test_pull_by_name(bed: Bed) -> None:
    content = bed.files["/small"]
    progress: list[PullProgress] = []
    async with bed.service() as service:
        image = await service.pull("virtlet.cloud/small", progress=progress.append)
        assert (image.id, image.size, image.layers) == (digest(content), len(content), [])
        assert image.repo_tags == ["virtlet.cloud/small:latest"]
        assert image.repo_digests == [f"virtlet.cloud/small@{digest(content)}"]
        names = ["virtlet.cloud/small", *image.repo_tags, *image.repo_digests, image.id, image.id[7:20]]
        assert [service.status(name) for name in names] == [image] * len(names)
        assert service.list() == [image]
        path, disk = await service.vm_disk(image)
        assert (disk.digest, disk.format, disk.virtual_size, disk.file_size) == (image.id, "qcow2", GIB, len(content))
        assert path == bed.paths.disks / f"{image.id[7:]}.qcow2"
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (content, 0o640)
        assert bed.paths.disks.stat().st_mode & 0o777 == 0o711
        usage = service.fs_usage()
        assert (usage.used_bytes, usage.used_inodes) == (len(content), 1)
    assert (progress[0].phase, progress[-1].phase) == (Phase.RESOLVING, Phase.DONE)
    assert bed.leftovers() == []
    async with bed.service() as service:
        assert service.list() == [image]
        assert await service.vm_disk(image) == (path, disk)


async def test_a_name_that_no_rule_knows_is_a_url(bed: Bed) -> None:
    async with bed.service() as service:
        with pytest.raises(InvalidArgument):
            await service.pull("virtlet.cloud/Small")
        with pytest.raises(RegistryUnavailable, match="nowhere"):
            await service.pull("virtlet.cloud/nowhere.invalid/disk")
        bed.translate(f"- {{name: gone, url: '{bed.server.url('/gone')}'}}")
        with pytest.raises(NotFound):
            await service.pull("virtlet.cloud/gone")
        assert (service.list(), bed.disks()) == ([], [])


async def test_pull_from_a_url(bed: Bed) -> None:
    url = bed.server.url("/small")
    async with bed.service() as service:
        image = await service.pull(url)
        assert image.id == digest(bed.files["/small"])
        (tag,) = image.repo_tags
        assert tag == f"localhost/127.0.0.1/small:url-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
        assert service.status(url) == service.status(tag) == image
        assert service.status(bed.server.url("/other")) is None
        assert service.status("http:///nothing") is None
        with pytest.raises(InvalidArgument, match="names no host"):
            await service.pull("http:///nothing")
        with pytest.raises(NotFound):
            await service.pull(bed.server.url("/gone"))
        await service.remove(url)
        assert (service.list(), bed.disks()) == ([], [])


async def test_pull_a_file(bed: Bed) -> None:
    first, second = bed.root / "a" / "VM 1.qcow2", bed.root / "b" / "VM 1.qcow2"
    for path, name in ((first, "/small"), (second, "/other")):
        path.parent.mkdir()
        path.write_bytes(bed.files[name])
    async with bed.service() as service:
        # Of one name, but two files: neither waits for the other and takes its content.
        images = await asyncio.gather(*(service.pull(path.as_uri()) for path in (first, second)))
        assert [image.id for image in images] == [digest(bed.files[name]) for name in ("/small", "/other")]
        tagged = service.status("localhost/vm-1.qcow2:latest")
        assert tagged is not None
        assert tagged.id in {image.id for image in images}
        first.write_bytes(bed.files["/other"])
        assert (await service.pull(first.as_uri())).id == images[1].id
        assert first.read_bytes() == bed.files["/other"]
        for place in (bed.root, bed.root / "none"):
            with pytest.raises((FailedPrecondition, NotFound)):
                await service.pull(place.as_uri())


async def test_one_content_under_two_names_is_one_file(bed: Bed) -> None:
    bed.files["/again"] = bed.files["/small"]
    bed.translate(
        f"- {{name: a, url: '{bed.server.url('/small')}'}}",
        f"- {{name: b, url: '{bed.server.url('/again')}'}}",
        f"- {{name: c, url: '{bed.server.url('/small')}'}}",
    )
    async with bed.service() as service:
        await asyncio.gather(*(service.pull(f"virtlet.cloud/{name}:1") for name in "abca"))
        (image,) = service.list()
        assert sorted(image.repo_tags) == [f"virtlet.cloud/{name}:1" for name in "abc"]
    # a and c are one download.
    assert sorted(request.target for request in bed.server.requests) == ["/again", "/small"]
    assert bed.disks() == [f"{image.id[7:]}.qcow2"]


async def test_a_changed_content_takes_the_tag(bed: Bed) -> None:
    async with bed.service() as service:
        first = await service.pull("virtlet.cloud/small")
        assert await service.pull("virtlet.cloud/small") != first  # used again
        assert len(bed.disks()) == 1
        bed.files["/small"] = bed.files["/other"]
        second = await service.pull("virtlet.cloud/small")
        assert second.id != first.id
        assert service.status("virtlet.cloud/small") == second
        before = service.status(first.id)
        assert before is not None
        assert (before.repo_tags, len(before.repo_digests)) == ([], 1)
        assert len(bed.disks()) == 2
        assert (await service.vm_disk(second))[1].virtual_size == 2 * GIB


async def test_what_the_server_says_has_not_changed_is_not_fetched(bed: Bed) -> None:
    async with bed.service() as service:
        first = await service.pull("virtlet.cloud/small")
    async with bed.service() as service:
        await service.sweep()
        assert (await service.pull("virtlet.cloud/small")).id == first.id
        assert [request.method for request in bed.server.requests] == ["GET", "HEAD"]
        await service.pull("virtlet.cloud/small:2")
        bed.files["/small"] = bytes(510) + b"\x55\xaa"
        bed.translate(f"- {{name: small, url: '{bed.server.url('/small')}', format: raw}}")
        assert (await service.pull("virtlet.cloud/small")).id == digest(bed.files["/small"])
        bed.server.requests.clear()
        await service.remove(first.id)
        bed.files["/small"] = bed.files["/other"]
        bed.translate(f"- {{name: small, url: '{bed.server.url('/small')}'}}")
        second = await service.pull("virtlet.cloud/small")
        assert [request.method for request in bed.server.requests] == ["HEAD", "GET"]
        await service.remove(second.id)
        bed.server.requests.clear()
        await service.pull("virtlet.cloud/small")  # known, but not here any more
        assert [request.method for request in bed.server.requests] == ["GET"]
        await service.remove("virtlet.cloud/small")
        await service.sweep()
        assert bed.leftovers() == []


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
async def test_a_server_that_says_nothing_of_changes(bed: Bed, etag: str) -> None:
    async def answer(request: Request, send: Send) -> None:
        await serve_file(request, send, bed.files["/small"], etag=etag)

    async with web(answer) as server, bed.service() as service:
        bed.translate(f"- {{name: small, url: '{server.url()}'}}")
        for _ in range(2):
            await service.pull("virtlet.cloud/small")
        assert [request.method for request in server.requests] == ["GET", "GET"]


async def test_what_a_checksum_says_is_here_is_not_fetched(bed: Bed) -> None:
    content = bed.files["/small"]
    bed.translate(f"- {{name: small, url: '{bed.server.url('/small')}', checksum: '{digest(content)}'}}")
    async with bed.service() as service:
        image = await service.pull("virtlet.cloud/small")
        await service.pull("virtlet.cloud/small")
        pinned = await service.pull(f"virtlet.cloud/other@{digest(content)}")
        assert (pinned.id, pinned.repo_tags) == (image.id, image.repo_tags)
    assert len(bed.server.requests) == 1


async def test_a_digest_has_to_be_right(bed: Bed) -> None:
    async with bed.service() as service:
        wrong = "sha256:" + "0" * 64
        with pytest.raises(BadImage, match="checksum"):
            await service.pull(f"virtlet.cloud/small@{wrong}")
        image = await service.pull(f"virtlet.cloud/small@{digest(bed.files['/small'])}")
        assert image.repo_tags == []
    assert bed.leftovers() == []


async def test_translations_are_read_again(bed: Bed) -> None:
    async with bed.service() as service:
        first = await service.pull("virtlet.cloud/small")
        bed.translate(f"- {{name: small, url: '{bed.server.url('/other')}'}}")
        assert (await service.pull("virtlet.cloud/small")).id != first.id
        bed.translate("- {name: small, uri: nowhere}")
        for _ in range(2):
            with pytest.raises(FailedPrecondition, match=r"rules\.yaml: translations\[0\]"):
                await service.pull("virtlet.cloud/small")
        bed.rules.unlink()
        bed.rules.with_name("new.yml").write_text(f"translations: [{{name: n, url: '{bed.server.url('/small')}'}}]")
        assert (await service.pull("virtlet.cloud/n")).id == first.id


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("small:1", "virtlet.cloud/small:1"),
        ("virtlet.cloud/small", "virtlet.cloud/small"),
        ("unknown", "unknown"),
        ("registry.example:5000/small", "registry.example:5000/small"),
        ("Not/A Name", "Not/A Name"),
        ("sha256:" + "a" * 64, "sha256:" + "a" * 64),
    ],
)
async def test_what_image_pods_mean(bed: Bed, reference: str, meant: str) -> None:
    async with bed.service() as service:
        assert await service.vm_name(reference) == meant


async def test_ids_are_no_names(bed: Bed) -> None:
    async with bed.service() as service:
        image = await service.pull("virtlet.cloud/small")
        bed.translate(f"- {{regexp: '.*', url: '{bed.server.url('/small')}'}}")
        assert await service.vm_name(image.id) == image.id
        assert await service.vm_name("anything") == "virtlet.cloud/anything"


async def refused(bed: Bed, error: type[Exception], words: str, **settings: object) -> None:
    async with bed.service(**settings) as service:
        with pytest.raises(error, match=words):
            await service.pull("virtlet.cloud/small")
        assert (service.list(), bed.disks(), bed.leftovers()) == ([], [], [])


async def test_hostile_disks_are_refused(bed: Bed) -> None:
    secret = bed.root / "secret"
    secret.write_bytes(bytes(MIB))
    options = ("-b", str(secret), "-F", "raw")
    bed.files["/small"] = qcow2(bed.root / "backed", "1G", *options)
    await refused(bed, BadDisk, "virtlet.cloud/small:latest: has a backing file")
    bed.files["/small"] = qcow2(bed.root / "huge", "1000T")
    await refused(bed, ResourceExhausted, "is a disk of .* bytes; .* are allowed")
    bed.files["/small"] = b"<html>not found</html>"
    await refused(bed, BadDisk, "is a web page")
    bed.files["/small"] = bytes(2 * GIB // 1024)
    await refused(bed, BadDisk, "no raw one that could be booted")
    bed.translate(f"- {{name: small, url: '{bed.server.url('/other')}', format: raw}}")
    await refused(bed, BadDisk, "is said to be raw, but is qcow2")


async def test_a_declared_format(bed: Bed) -> None:
    bed.files["/small"] = bytes(MIB)
    bed.translate(f"- {{name: small, url: '{bed.server.url('/small')}', format: raw}}")
    async with bed.service() as service:
        image = await service.pull("virtlet.cloud/small")
        path, disk = await service.vm_disk(image)
        assert (path.suffix, disk.format, disk.virtual_size) == (".raw", "raw", MIB)


async def test_removal_waits_for_pods(bed: Bed) -> None:
    async with bed.service() as service:
        image = await service.pull("virtlet.cloud/small")
        bed.images_used = {image.id}
        path, disk = await service.vm_disk(image)
        await service.remove("virtlet.cloud/small")
        assert service.list() == []
        assert path.exists(), "a container is being made from it"
        bed.images_used, bed.disks_used = set(), {disk.digest}
        await service.sweep()
        assert path.exists()
    async with bed.service() as service:  # which knows of no image
        await service.sweep()
        assert path.exists()
        bed.disks_used = set()
        await service.sweep()
        assert bed.disks() == []
        await service.remove("virtlet.cloud/small")


async def test_an_image_that_is_not_needed_goes_with_its_disk(bed: Bed) -> None:
    async with bed.service(pinned=["virtlet.cloud/other"]) as service:
        bed.translate(
            f"- {{name: small, url: '{bed.server.url('/small')}'}}",
            f"- {{name: other, url: '{bed.server.url('/other')}'}}",
        )
        small, other = await service.pull("virtlet.cloud/small"), await service.pull("virtlet.cloud/other")
        assert (small.pinned, other.pinned) == (False, True)
        pruned = await service.prune(0)
        assert ([image.id for image in pruned.images], pruned.freed_bytes) == ([small.id], small.size)
        assert bed.disks() == [f"{other.id[7:]}.qcow2"]
        await service.remove(other.id)
        assert bed.disks() == []


async def test_what_is_missing_or_unknown_after_a_crash(bed: Bed) -> None:
    bed.files["/third"] = qcow2(bed.root / "third", "3G")
    bed.translate(*(f"- {{name: {name}, url: '{bed.server.url(f'/{name}')}'}}" for name in ("small", "other", "third")))
    async with bed.service() as service:
        images: list[Image] = [await service.pull(f"virtlet.cloud/{name}") for name in ("small", "other", "third")]
        paths = [(await service.vm_disk(image))[0] for image in images]
    paths[0].unlink()
    os.truncate(paths[1], 100)
    (bed.paths.disks / f"{'0' * 64}.raw").write_bytes(b"renamed, not recorded")
    bed.paths.downloads.mkdir(exist_ok=True)
    old, new = bed.paths.downloads / "old.part", bed.paths.downloads / "new.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, time.time() - KEPT_SECONDS - 60))
    async with bed.service() as service:
        assert service.list() == [images[2]]
        with pytest.raises(FailedPrecondition, match="pull it again"):
            await service.vm_disk(images[0])
        await service.sweep()
        assert bed.disks() == [paths[2].name]
        assert (old.exists(), new.exists()) == (False, True)
        await service.pull("virtlet.cloud/small")
    assert len(bed.disks()) == 2


async def test_a_pull_that_is_cancelled_is_gone_on_with(bed: Bed) -> None:
    content = bed.files["/small"] = bed.files["/small"] + bytes(8 * MIB)
    slow = asyncio.Event()
    starts: list[int] = []

    async def answer(request: Request, send: Send) -> None:
        starts.append(request.start)
        await serve_file(request, send, content, stop=None if request.start else len(content) // 2)
        if not request.start:
            slow.set()
            await asyncio.sleep(60)

    async with web(answer) as server:
        bed.translate(f"- {{name: small, url: '{server.url()}'}}")
        async with bed.service() as service:
            pull = asyncio.ensure_future(service.pull("virtlet.cloud/small"))
            await slow.wait()
            part = bed.paths.downloads
            while not any(path.stat().st_size for path in part.glob("*.part")):
                await asyncio.sleep(0.01)
            pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pull
            assert list(bed.paths.incoming.iterdir()) == []
            await service.sweep()
            image = await service.pull("virtlet.cloud/small")
    assert image.id == digest(content)
    assert starts[0] == 0
    assert starts[-1] > 0
