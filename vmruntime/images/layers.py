"""The layers on this host's disk: made once, shared by all images, freed when nothing needs them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import Internal
from vmruntime.images import erofs
from vmruntime.images.scratch import ScratchSpace
from vmruntime.images.shared import SharedWork
from vmruntime.model.image import Layer
from vmruntime.store.image_records import ImageRecords

log = structlog.get_logger()

_SUFFIX = ".erofs"


class _InputGone(Exception):
    """Raised when the blob went away with the pull that brought it."""


class LayerStore:
    """EROFS images by diffID.

    A layer is needed while an image has it, a container runs on it, or someone holds it (a pull under way, a
    container being created). What is not needed goes with `collect`.
    """

    def __init__(
        self, directory: Path, incoming: ScratchSpace, records: ImageRecords, *, limit: int, group_id: int | None
    ) -> None:
        """Read nothing yet; `load` does.

        Args:
            directory: Where the layers are; a single file system with `incoming`.
            incoming: Where they are made.
            records: The store.
            limit: Most uncompressed bytes of a layer.
            group_id: The group hypervisors run in, which may read layers; None: root's alone.
        """
        self._directory = directory
        self._incoming = incoming
        self._records = records
        self._limit = limit
        self._group_id = group_id
        self._layers: dict[str, Layer] = {}
        self._holds: dict[str, set[str]] = {}
        self._making: SharedWork[str, Layer] = SharedWork()
        # Held while files appear or vanish, so that a layer is never removed between being made and being known.
        self._changing = asyncio.Lock()
        # Unpacking is bound by the processor.
        self._slots = asyncio.Semaphore(os.cpu_count() or 1)

    async def load(self, known: Iterable[Layer]) -> None:
        """Take in what the store knows, without the layers whose file is gone or cut short."""
        listed = list(known)
        sound = await in_thread(lambda: self._prepare(listed))
        self._layers = {layer.diff_id: layer for layer in sound}
        lost = [layer.diff_id for layer in listed if layer.diff_id not in self._layers]
        if lost:
            log.warning("layers are missing on disk", layers=lost)
            await self._records.delete_layers(lost)

    def get(self, diff_id: str) -> Layer | None:
        """Return a layer that is ready."""
        return self._layers.get(diff_id)

    def path(self, diff_id: str) -> Path:
        """Return where a layer's file is, or would be."""
        return self._directory / f"{diff_id.removeprefix('sha256:')}{_SUFFIX}"

    def hold(self, owner: str, diff_ids: Iterable[str]) -> None:
        """Keep layers, present or coming, until the owner releases them; adds to what it holds."""
        self._holds.setdefault(owner, set()).update(diff_ids)

    def release(self, owner: str) -> None:
        """End an owner's holds; files go at the next collect."""
        self._holds.pop(owner, None)

    def usage(self) -> tuple[int, int]:
        """Return the bytes and inodes that layers take. May be called in any thread."""
        layers = tuple(self._layers.values())
        return sum(layer.size for layer in layers), len(layers)

    async def add(self, diff_id: str, blob: Path) -> Layer:
        """Make a layer from its blob, or wait for whoever is making it.

        Args:
            diff_id: Digest of the uncompressed tar; checked.
            blob: On the file system of the incoming directory; stays the caller's.

        Raises:
            BadImage, ResourceExhausted: See erofs.build.
        """
        while True:
            if layer := self._layers.get(diff_id):
                return layer
            try:
                return await self._making.join(diff_id, lambda: self._make(diff_id, blob))
            except _InputGone:
                if not await in_thread(blob.exists):
                    raise Internal(f"the blob of layer {diff_id} has gone") from None

    async def collect(self, needed: Callable[[], set[str]]) -> int:
        """Remove the layers that are neither needed nor held and return the bytes freed."""
        async with self._changing:
            keep = needed().union(*self._holds.values())
            doomed = [layer for diff_id, layer in self._layers.items() if diff_id not in keep]
            if not doomed:
                return 0
            for layer in doomed:
                del self._layers[layer.diff_id]
            await self._records.delete_layers(layer.diff_id for layer in doomed)
            await in_thread(lambda: _unlink([self.path(layer.diff_id) for layer in doomed]))
        freed = sum(layer.size for layer in doomed)
        log.info("layers removed", count=len(doomed), bytes=freed)
        return freed

    async def sweep(self) -> None:
        """Remove files that the store does not know: a crash came between a rename and its record."""
        async with self._changing:
            known = {self.path(diff_id).name for diff_id in self._layers}
            await in_thread(lambda: self._sweep(known))

    async def _make(self, diff_id: str, blob: Path) -> Layer:
        async with self._slots, self._incoming.directory() as work:
            own = work / "blob"
            try:
                # A link of our own: the pull that brought the blob may be cancelled while others wait for the layer.
                await in_thread(lambda: os.link(blob, own))
            except FileNotFoundError:
                raise _InputGone from None
            image = await erofs.build(own, diff_id, work, self._limit)
            async with self._changing:
                size = await in_thread(lambda: self._publish(image, self.path(diff_id)))
                layer = Layer(diff_id=diff_id, size=size)
                await self._records.put_layer(layer)
                self._layers[diff_id] = layer
        return layer

    def _publish(self, image: Path, target: Path) -> int:
        os.chmod(image, 0o440)
        if self._group_id is not None:
            os.chown(image, -1, self._group_id)
        size = image.stat().st_size
        os.rename(image, target)
        _sync_directory(target.parent)
        return size

    def _prepare(self, listed: list[Layer]) -> list[Layer]:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o750)
        if self._group_id is not None:
            os.chown(self._directory, -1, self._group_id)
            parent = self._directory.parent
            parent.chmod(parent.stat().st_mode | 0o011)  # or hypervisors could not reach the directory
        return [layer for layer in listed if _size(self.path(layer.diff_id)) == layer.size]

    def _sweep(self, known: set[str]) -> None:
        for path in self._directory.iterdir():
            if path.name not in known:
                path.unlink()


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
