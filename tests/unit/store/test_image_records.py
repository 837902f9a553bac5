from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmruntime.model.image import Image, ImageConfig, Layer
from vmruntime.store.database import Database
from vmruntime.store.image_records import ImageRecords


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(tmp_path / "db")
    yield opened
    await opened.close()


def image(letter: str, *tags: str) -> Image:
    return Image(
        id=f"sha256:{letter * 64}",
        repo_tags=list(tags),
        layers=[Layer(diff_id="sha256:1", size=4096)],
        config=ImageConfig(env=["A=b"], labels={"k": "v"}),
        size=4096,
        created_at=7,
    )


async def names(database: Database) -> dict[str, str]:
    return dict(await database.read(lambda c: c.execute("SELECT name, image_id FROM image_names").fetchall()))


async def test_round_trip_and_names(database: Database) -> None:
    records = ImageRecords(database)
    a = image("a", "x:1", "x:2")
    await records.put_images([a])
    assert await records.load() == ([a], [])
    fewer, b = image("a", "x:1"), image("b", "x:2")
    await records.put_images([fewer, b])
    assert await names(database) == {"x:1": a.id, "x:2": b.id}
    await records.delete_images([a.id, "sha256:absent"])
    assert await names(database) == {"x:2": b.id}
    assert (await records.load())[0] == [b]


async def test_layers(database: Database) -> None:
    records = ImageRecords(database)
    await records.put_layer(Layer(diff_id="sha256:1", size=1))
    await records.put_layer(Layer(diff_id="sha256:1", size=2))
    await records.put_layer(Layer(diff_id="sha256:2", size=3))
    await records.delete_layers(["sha256:2", "sha256:3"])
    assert (await records.load())[1] == [Layer(diff_id="sha256:1", size=2)]
