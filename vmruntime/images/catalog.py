"""Which image a name means: the images in memory, as the store has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from vmruntime.errors import InvalidArgument
from vmruntime.images import reference as references
from vmruntime.images.reference import Reference
from vmruntime.model.image import Image


class Catalog:
    """Images by id and by name. It changes nothing on disk: the service writes the store first."""

    def __init__(self, images: Iterable[Image] = (), resolve: Callable[[str], Reference] = references.parse) -> None:
        """Take in images; `resolve` makes names as people write them full."""
        self._resolve = resolve
        self._images = {image.id: image for image in images}
        self._names = {name: image.id for image in self._images.values() for name in _names(image)}

    def all(self) -> list[Image]:
        """Return all images, oldest first. May be called in any thread."""
        return sorted(tuple(self._images.values()), key=lambda image: (image.created_at, image.id))

    def get(self, image_id: str) -> Image | None:
        """Return the image of a full id."""
        return self._images.get(image_id)

    def find(self, text: str) -> Image | None:
        """Return the image a person or kubelet means: by full id, by name, by the beginning of an id.

        What can be no image's name is here as little as any other unknown one: clients such as kubelet ask before they
        pull, and learn from the pull what is wrong with the name (containerd's CRI service answers alike).

        Raises:
            InvalidArgument: It begins several ids.
        """
        prefix = references.id_prefix(text)
        if prefix is not None and (image := self._images.get(prefix)):
            return image
        try:
            name = str(self._resolve(text))
        except InvalidArgument:
            pass
        else:
            if name in self._names:
                return self._images[self._names[name]]
        return self._by_prefix(prefix) if prefix is not None else None

    def layers_in_use(self, without: Iterable[str] = ()) -> set[str]:
        """Return the diffIDs that images have, but for the images with these ids."""
        left_out = set(without)
        return {layer.diff_id for image in self._images.values() if image.id not in left_out for layer in image.layers}

    def disks_in_use(self, without: Iterable[str] = ()) -> set[str]:
        """Return the digests of disks that images have, but for the images with these ids."""
        left_out = set(without)
        return {i.disk.digest for i in self._images.values() if i.id not in left_out and i.disk is not None}

    def with_image(self, image: Image) -> list[Image]:
        """Return what changes when an image is added.

        That is first the images that lose a name to it, then itself, with the names it had before.
        """
        before = self._images.get(image.id)
        if before is not None:
            keeps_disk = image.disk is None
            image = msgspec.structs.replace(
                image,
                disk=before.disk if keeps_disk else image.disk,
                size=before.size if keeps_disk else image.size,
                repo_tags=_union(before.repo_tags, image.repo_tags),
                repo_digests=_union(before.repo_digests, image.repo_digests),
                created_at=before.created_at,
                last_used_at=max(before.last_used_at, image.last_used_at),
            )
        names = set(_names(image))
        losers = {self._names[name] for name in names if self._names.get(name, image.id) != image.id}
        return [_without(self._images[loser], names) for loser in sorted(losers)] + [image]

    def put(self, images: Iterable[Image]) -> None:
        """Take in images as `with_image` returned them."""
        for image in images:
            self.drop([image.id])
            self._images[image.id] = image
            self._names.update(dict.fromkeys(_names(image), image.id))

    def drop(self, ids: Iterable[str]) -> None:
        """Forget images and their names."""
        for image_id in ids:
            if image := self._images.pop(image_id, None):
                for name in _names(image):
                    if self._names.get(name) == image_id:
                        del self._names[name]

    def _by_prefix(self, prefix: str) -> Image | None:
        found = [image for image_id, image in self._images.items() if image_id.startswith(prefix)]
        if len(found) > 1:
            raise InvalidArgument.field("image", prefix, f"begins the ids of {len(found)} images")
        return found[0] if found else None


def _names(image: Image) -> list[str]:
    return [*image.repo_tags, *image.repo_digests]


def _without(image: Image, names: set[str]) -> Image:
    return msgspec.structs.replace(
        image,
        repo_tags=[name for name in image.repo_tags if name not in names],
        repo_digests=[name for name in image.repo_digests if name not in names],
    )


def _union(first: list[str], second: list[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
