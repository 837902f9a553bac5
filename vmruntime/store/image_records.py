"""Images, their names and their layers in the store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import msgspec

from vmruntime.model.image import Image, Layer
from vmruntime.store.database import Database


class ImageRecords:
    """The rows of images: every change is written before it is told to anyone."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> tuple[list[Image], list[Layer]]:
        """Return everything, in no particular order."""

        def query(connection: sqlite3.Connection) -> tuple[list[Image], list[Layer]]:
            images = connection.execute("SELECT record FROM images").fetchall()
            layers = connection.execute("SELECT diff_id, size FROM layers").fetchall()
            return [msgspec.json.decode(row[0], type=Image) for row in images], [
                Layer(diff_id=row[0], size=row[1]) for row in layers
            ]

        return await self._database.read(query)

    async def put_images(self, images: Iterable[Image]) -> None:
        """Insert or replace images in one transaction; a name goes to the last image that has it.

        An image that loses a name to another is to be among `images`, without it.
        """
        changed = list(images)

        def change(connection: sqlite3.Connection) -> None:
            for image in changed:
                connection.execute(
                    "INSERT INTO images (id, record) VALUES (?, ?)"
                    " ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                    (image.id, msgspec.json.encode(image)),
                )
                connection.execute("DELETE FROM image_names WHERE image_id = ?", (image.id,))
            for image in changed:
                connection.executemany(
                    "INSERT OR REPLACE INTO image_names (name, image_id) VALUES (?, ?)",
                    [(name, image.id) for name in (*image.repo_tags, *image.repo_digests)],
                )

        await self._database.write(change)

    async def delete_images(self, ids: Iterable[str]) -> None:
        """Delete images and their names; success when they are gone already."""
        rows = [(image_id,) for image_id in ids]
        await self._database.write(lambda c: c.executemany("DELETE FROM images WHERE id = ?", rows))

    async def put_layer(self, layer: Layer) -> None:
        """Insert or replace one layer."""

        def change(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO layers (diff_id, size) VALUES (?, ?)"
                " ON CONFLICT (diff_id) DO UPDATE SET size = excluded.size",
                (layer.diff_id, layer.size),
            )

        await self._database.write(change, adds=True)

    async def delete_layers(self, diff_ids: Iterable[str]) -> None:
        """Delete layers; success when they are gone already."""
        rows = [(diff_id,) for diff_id in diff_ids]
        await self._database.write(lambda c: c.executemany("DELETE FROM layers WHERE diff_id = ?", rows))
