"""Which images are collected by age, in the service with its store: no registry, layers as plain files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tests.support.fakes import NOW, FakeClock, make_image
from vmruntime.config.settings import ImageSettings
from vmruntime.daemon.prune import DAY, prune_old
from vmruntime.errors import Unavailable
from vmruntime.images.prune import bytes_of, stale
from vmruntime.images.service import ImageService
from vmruntime.model.image import DiskImage, Image, Pruned
from vmruntime.paths import Paths
from vmruntime.store.database import Database
from vmruntime.store.image_records import ImageRecords

HOUR = 3600 * 10**9


def aged(name: str, layers: str, hours: float, **changes: object) -> Image:
    """Return an image that was pulled and last used so many hours ago."""
    then = NOW - int(hours * HOUR)
    return msgspec.structs.replace(make_image(name, layers), created_at=then, last_used_at=then, **changes)


def test_stale() -> None:
    old, older = aged("old", "a", 50), aged("older", "b", 60)
    others = [aged("new", "c", 1), aged("pinned", "d", 90, pinned=True), aged("used", "e", 90)]
    never_noted = msgspec.structs.replace(aged("unnoted", "f", 1), last_used_at=0)
    images = [old, older, *others, never_noted]
    assert stale(images, {others[2].id}, NOW - 48 * HOUR) == [older, old]
    assert stale(images, set(), NOW - 100 * HOUR) == []


def test_bytes_of_counts_a_layer_once_and_no_shared_one() -> None:
    images = [make_image("x", "ab"), make_image("y", "bc")]
    assert bytes_of(images, set(), set()) == 3 * 4096
    assert bytes_of(images, {"sha256:" + "a" * 64}, set()) == 2 * 4096


def test_bytes_of_counts_a_disk_once_and_no_shared_one() -> None:
    # A containerDisk's disk is called as the layer that it came in: one may be needed without the other.
    digest = "sha256:" + "a" * 64
    disk = DiskImage(digest=digest, format="qcow2", virtual_size=2**30, file_size=1000)
    images = [msgspec.structs.replace(make_image(name, "a"), disk=disk) for name in "xy"]
    assert bytes_of(images, set(), set()) == 4096 + 1000
    assert bytes_of(images, {digest}, set()) == 1000
    assert bytes_of(images, set(), {digest}) == 4096


class Rig:
    """A service whose images are written into the store directly."""

    def __init__(self, root: Path, database: Database) -> None:
        self.paths = Paths(root / "lib", root / "run")
        self.database = database
        self.used: set[str] = set()
        self.layers: set[str] = set()

    async def service(self, *images: Image, pinned: list[str] | None = None) -> ImageService:
        self.paths.layers.mkdir(parents=True, exist_ok=True)
        records = ImageRecords(self.database)
        await records.put_images(images)
        for image in images:
            for layer in image.layers:
                await records.put_layer(layer)
                (self.paths.layers / f"{layer.diff_id.removeprefix('sha256:')}.erofs").write_bytes(b"\0" * layer.size)
        service = ImageService(
            self.paths,
            self.database,
            ImageSettings(registries_conf=str(self.paths.root / "none"), pinned=pinned or []),
            FakeClock(),
            in_use=lambda: self.layers,
            images_in_use=lambda: self.used,
        )
        await service.load()
        return service

    def files(self) -> str:
        return "".join(sorted(path.name[0] for path in self.paths.layers.iterdir()))

    async def stored(self) -> list[str]:
        images, _ = await ImageRecords(self.database).load()
        return sorted(image.repo_tags[0].rpartition("/")[2] for image in images)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    (tmp_path / "lib").mkdir()
    database = await Database.open(tmp_path / "lib" / "db")
    yield Rig(tmp_path, database)
    await database.close()


async def test_prune_takes_what_is_old_and_nothing_else(rig: Rig) -> None:
    images = {name: aged(name, layers, hours) for name, layers, hours in
              (("old", "xa", 200), ("used", "xb", 200), ("pinned", "xc", 200), ("new", "xd", 1))}  # fmt: skip
    service = await rig.service(*images.values(), pinned=["pinned:1"])
    rig.used = {images["used"].id}
    rig.layers = {layer.diff_id for layer in images["used"].layers}
    dry = await service.prune(7 * DAY, dry_run=True)
    assert ([image.id for image in dry.images], dry.freed_bytes) == ([images["old"].id], 4096)
    assert (rig.files(), len(service.list())) == ("abcdx", 4)
    assert (await service.prune(7 * DAY)) == dry
    assert (rig.files(), await rig.stored()) == ("bcdx", ["new:1", "pinned:1", "used:1"])
    assert service.status("old:1") is None
    assert (await service.prune(7 * DAY)).images == []
    assert [(use.image.repo_tags[0][-6:], use.in_use) for use in service.uses()].count(("used:1", True)) == 1
    rig.used, rig.layers = set(), set()
    assert [image.id for image in (await service.prune(0)).images] == [images["used"].id, images["new"].id]
    assert (rig.files(), await rig.stored()) == ("cx", ["pinned:1"])


async def test_use_is_noted_in_the_store(rig: Rig) -> None:
    old, volume = aged("old", "a", 200), aged("volume", "b", 200)
    service = await rig.service(old, volume)
    await service.touch([old.id, volume.id, "sha256:unknown"])
    assert (await service.prune(DAY)).images == []
    reloaded = await rig.service()
    assert all(image.last_used_at > NOW for image in reloaded.list())


async def test_a_container_made_meanwhile_does_not_find_what_goes(rig: Rig) -> None:
    """From the choice on the image is not found, however long the store takes; a failing store brings it back."""
    service = await rig.service(aged("old", "a", 200))
    pruning = asyncio.ensure_future(service.prune(DAY))
    while not pruning.done():
        image = service.status("old:1")
        if image is not None:  # what CreateContainer does in one step
            rig.used.add(image.id)
            rig.layers |= {layer.diff_id for layer in image.layers}
            break
        await asyncio.sleep(0)
    pruned = await pruning
    # The image was found before the choice: then it stays, with its layers.
    assert (pruned.images, rig.files(), await rig.stored()) == ([], "a", ["old:1"])
    rig.used.clear()
    rig.layers.clear()
    deleting = asyncio.ensure_future(service.prune(DAY))
    await asyncio.sleep(0)
    assert not deleting.done()
    assert service.status("old:1") is None
    assert len((await deleting).images) == 1


async def test_a_failing_store_brings_the_image_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    service = await rig.service(aged("old", "a", 200))

    async def fail(self: ImageRecords, ids: object) -> None:
        raise Unavailable("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(ImageRecords, "delete_images", fail)
        with pytest.raises(Unavailable):
            await service.prune(DAY)
    assert service.status("old:1") is not None
    assert rig.files() == "a"


async def test_the_daemon_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    ages: list[float] = []
    twice = asyncio.Event()

    class Images:
        async def prune(self, unused_seconds: float) -> Pruned:
            ages.append(unused_seconds)
            if len(ages) == 1:
                raise Unavailable("the disk is gone")
            twice.set()
            return Pruned(images=[], freed_bytes=0)

    task = asyncio.ensure_future(prune_old(Images(), 0.04 / DAY))
    async with asyncio.timeout(10):
        await twice.wait()
    task.cancel()
    await asyncio.wait([task])
    assert ages[0] == pytest.approx(0.04)
