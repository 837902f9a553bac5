"""CRI's ImageService: it checks and translates, and leaves the doing to images."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from vmruntime import tracing
from vmruntime.clock import Clock
from vmruntime.cri.ports import Images
from vmruntime.cri.streams import pieces
from vmruntime.cri.translate.image import (
    auth_from_cri,
    fs_usage_to_cri,
    image_info,
    image_to_cri,
    reference_from_cri,
    wants_disk,
)
from vmruntime.errors import NotFound
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import ImageServiceServicer
from vmruntime.images.endpoint import redacted
from vmruntime.model.image import Image


class ImageService(ImageServiceServicer):
    """Every method of runtime.v1.ImageService."""

    def __init__(self, images: Images, clock: Clock) -> None:
        self._images = images
        self._clock = clock

    async def ListImages(self, request: cri.ListImagesRequest, context: Any) -> cri.ListImagesResponse:
        """List images; a filter names one."""
        return cri.ListImagesResponse(images=[image_to_cri(image) for image in self._matching(request.filter)])

    async def StreamImages(
        self, request: cri.StreamImagesRequest, context: Any
    ) -> AsyncIterator[cri.StreamImagesResponse]:
        """List images in pieces."""
        for piece in pieces(image_to_cri(image) for image in self._matching(request.filter)):
            yield cri.StreamImagesResponse(images=piece)

    async def ImageStatus(self, request: cri.ImageStatusRequest, context: Any) -> cri.ImageStatusResponse:
        """Return an image; one that is not here is an empty answer, not an error."""
        reference = reference_from_cri(request.image, given=request.HasField("image"))
        if wants_disk(request.image):
            reference = await self._images.vm_name(reference)
        image = self._images.status(reference)
        if image is None:
            return cri.ImageStatusResponse()
        return cri.ImageStatusResponse(image=image_to_cri(image), info=image_info(image) if request.verbose else None)

    async def PullImage(self, request: cri.PullImageRequest, context: Any) -> cri.PullImageResponse:
        """Pull an image and return its id, which every later answer repeats (CRI's rule since Kubernetes 1.36)."""
        reference = reference_from_cri(request.image, given=request.HasField("image"))
        for_vm = wants_disk(request.image, request.sandbox_config)
        if for_vm:
            reference = await self._images.vm_name(reference)
        tracing.annotate({"container.image.name": redacted(reference)})
        image = await self._images.pull(reference, auth_from_cri(request), for_vm=for_vm)
        return cri.PullImageResponse(image_ref=image.id)

    async def RemoveImage(self, request: cri.RemoveImageRequest, context: Any) -> cri.RemoveImageResponse:
        """Remove an image with all its names; one that is not here is success."""
        reference = reference_from_cri(request.image, given=request.HasField("image"))
        with contextlib.suppress(NotFound):
            await self._images.remove(reference)
        return cri.RemoveImageResponse()

    async def ImageFsInfo(self, request: cri.ImageFsInfoRequest, context: Any) -> cri.ImageFsInfoResponse:
        """Return what images take on disk."""
        return fs_usage_to_cri(self._images.fs_usage(), self._clock.now_ns())

    def _matching(self, message: cri.ImageFilter) -> list[Image]:
        if not message.image.image:
            found = self._images.list()
        else:
            reference = reference_from_cri(message.image, given=True)
            image = self._images.status(reference)
            found = [image] if image is not None else []
        return sorted(found, key=lambda image: (image.created_at, image.id))
