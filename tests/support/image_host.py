"""An image service on directories of its own, for tests against a real registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support import registry as reg
from vmruntime.clock import SystemClock
from vmruntime.config.settings import ImageSettings
from vmruntime.images.platform import Platform
from vmruntime.images.service import ImageService
from vmruntime.paths import Paths
from vmruntime.store.database import Database

NAME = "registry.example/app:1"


class Host:
    """A directory tree with a service on it, which can be restarted."""

    def __init__(self, root: Path, address: str, **settings: Any) -> None:
        """Send registry.example and docker.io to the registry at `address`, and dead.example to where nobody is.

        Args:
            root: Is made.
            address: host:port.
            settings: More of [images].
        """
        self.paths = Paths(root / "lib", root / "run")
        root.mkdir(exist_ok=True)
        locations = {"registry.example": address, "docker.io": address, "dead.example": "127.0.0.1:1"}
        conf = reg.registries_conf(root / "registries.conf", locations)
        self.settings = ImageSettings(**{"registries_conf": str(conf), **settings})

    @asynccontextmanager
    async def service(self, **options: Any) -> AsyncIterator[ImageService]:
        database = await Database.open(self.paths.database)
        try:
            options.setdefault("platform", Platform("amd64"))
            service = ImageService(self.paths, database, self.settings, SystemClock(), **options)
            await service.load()
            yield service
        finally:
            await database.close()

    def leftovers(self) -> list[Path]:
        """What is left of work in progress."""
        places = (self.paths.incoming, self.paths.run / "pulls")
        return [path for place in places if place.exists() for path in place.iterdir()]

    def layer_files(self) -> list[Path]:
        return sorted(self.paths.layers.iterdir())
