"""The image service as CRI sees it: pulls, and imports by a reference that names a file."""

from __future__ import annotations

from collections.abc import Sequence

from vmruntime.errors import NotFound
from vmruntime.images.service import FsUsage, ImageService
from vmruntime.model.image import Image, ImageUse, Pruned, RegistryAuth

IMPORT_TRANSPORTS = ("oci:", "oci-archive:", "docker-archive:")
"""containers-transports(5) names that PullImage takes besides registry names; CRI has no call to import."""


class DaemonImages:
    """Implements cri.ports.Images."""

    def __init__(self, service: ImageService) -> None:
        self._service = service

    async def pull(self, reference: str, auth: RegistryAuth | None, *, for_vm: bool = False) -> Image:
        """Pull from a registry or by URL, or import an image from this host's disk.

        kubelet takes neither URLs nor transports for names of images, so no pod can have the daemon read a file.
        """
        if not reference.startswith(IMPORT_TRANSPORTS):
            return await self._service.pull(reference, auth, for_vm=for_vm)
        imported = await self._service.import_archive(reference)
        if not imported:
            raise NotFound(f"{reference} holds no image")
        if for_vm:
            await self._service.vm_disk(imported[0])
        return imported[0]

    async def vm_name(self, reference: str) -> str:
        """Return what an image pod means by a reference."""
        return reference if reference.startswith(IMPORT_TRANSPORTS) else await self._service.vm_name(reference)

    def status(self, reference: str) -> Image | None:
        """Return an image that is here."""
        return self._service.status(reference)

    def list(self) -> list[Image]:
        """Return every image here."""
        return self._service.list()

    async def remove(self, reference: str) -> None:
        """Forget an image; one that is not here: success."""
        await self._service.remove(reference)

    def uses(self) -> Sequence[ImageUse]:
        """Return every image here and whether a container has it."""
        return self._service.uses()

    async def prune(self, unused_seconds: float, *, dry_run: bool) -> Pruned:
        """Remove images that nobody has used for so long."""
        return await self._service.prune(unused_seconds, dry_run=dry_run)

    def fs_usage(self) -> FsUsage:
        """Return what the layers take on disk."""
        return self._service.fs_usage()
