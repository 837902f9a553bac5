"""Images of which VMs boot: where their names lead, and their disks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import structlog

from vmruntime.config.settings import ImageSettings
from vmruntime.errors import InvalidArgument
from vmruntime.images import reference as references
from vmruntime.images.container_disks import ContainerDisks
from vmruntime.images.disks import DiskStore
from vmruntime.images.scratch import ScratchSpace
from vmruntime.images.translation import PREFIX, image_name
from vmruntime.images.url_images import UrlImages
from vmruntime.model.image import DiskImage, Image, Layer
from vmruntime.paths import Paths

log = structlog.get_logger()

_GIB = 1024**3


class VmImages:
    """The parts that VM images are made with.

    Attributes:
        disks: Files.
        urls: Images by URL.
        containers: Images of registries that hold a disk.
    """

    def __init__(
        self,
        paths: Paths,
        settings: ImageSettings,
        incoming: ScratchSpace,
        homes: ScratchSpace,
        layer_path: Callable[[Layer], Path],
        account: str,
    ) -> None:
        """Read nothing yet; see the parts on arguments."""
        self.disks = DiskStore(paths.disks, max_virtual_size=settings.max_disk_gib * _GIB, account=account)
        self.urls = UrlImages(Path(settings.translations_dir), paths.downloads, incoming, homes, self.disks)
        self.containers = ContainerDisks(self.disks, incoming, layer_path)
        self._given: dict[str, str] = {}

    async def load(self, images: Iterable[Image]) -> tuple[list[Image], list[Image]]:
        """Take in the disks of images.

        Returns:
            The images as they are now, and those that have nothing left. A containerDisk that has lost its disk is whole
            without it: it is taken out again.
        """
        listed = list(images)
        await self.disks.load(image.disk for image in listed if image.disk is not None)
        whole, lost = [], []
        for image in listed:
            if image.disk is None or self.disks.get(image.disk.digest) is not None:
                whole.append(image)
            elif image.layers:
                whole.append(with_disk(image, None))
            else:
                lost.append(image)
        return whole, lost

    async def name(self, reference: str) -> str:
        """Return what an image pod means by a reference: virtlet.cloud/NAME where a translation knows NAME.

        Raises:
            FailedPrecondition: A translation file cannot be used.
        """
        if reference.startswith(PREFIX):
            return reference
        try:
            references.parse(f"{PREFIX}{reference}")
            known = await self.urls.knows(image_name(reference)[0])
        except InvalidArgument:  # of a registry with a port, an archive, an id
            return reference
        return f"{PREFIX}{reference}" if known else reference

    def give(self, image: Image, digest: str) -> None:
        """Note that a container is going to have an image's disk."""
        self._given[image.id] = digest

    def given(self, images_in_use: set[str]) -> set[str]:
        """Return the disks that were given to containers which are there still, so that none goes under one that is being made."""
        self._given = {image: digest for image, digest in self._given.items() if image in images_in_use}
        return set(self._given.values())


def with_disk(image: Image, disk: DiskImage | None) -> Image:
    """Return a containerDisk whose disk is taken out, or is not."""
    size = sum(layer.size for layer in image.layers) + (disk.file_size if disk is not None else 0)
    return msgspec.structs.replace(image, disk=disk, size=size)
