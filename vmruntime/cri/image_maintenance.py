"""vmruntime's own calls on images, which CRI does not have (proto/maintenance.proto)."""

from __future__ import annotations

from typing import Any

from vmruntime.cri.ports import Images
from vmruntime.cri.translate.checks import number
from vmruntime.generated import maintenance_pb2 as own
from vmruntime.generated.maintenance_pb2_grpc import ImageMaintenanceServicer


class ImageMaintenance(ImageMaintenanceServicer):
    """Every method of vmruntime.v1.ImageMaintenance."""

    def __init__(self, images: Images) -> None:
        self._images = images

    async def ListImageUse(self, request: own.ListImageUseRequest, context: Any) -> own.ListImageUseResponse:
        """Return when each image was last used."""
        uses = [
            own.ImageUse(id=use.image.id, last_used_at=use.image.last_used_at, in_use=use.in_use)
            for use in self._images.uses()
        ]
        return own.ListImageUseResponse(images=uses)

    async def PruneImages(self, request: own.PruneImagesRequest, context: Any) -> own.PruneImagesResponse:
        """Remove images that nobody has used for some time."""
        seconds = number("unused_seconds", request.unused_seconds)
        pruned = await self._images.prune(float(seconds), dry_run=request.dry_run)
        images = [
            own.PrunedImage(
                id=image.id,
                repo_tags=image.repo_tags,
                repo_digests=image.repo_digests,
                last_used_at=image.last_used_at,
            )
            for image in pruned.images
        ]
        return own.PruneImagesResponse(images=images, freed_bytes=pruned.freed_bytes)
