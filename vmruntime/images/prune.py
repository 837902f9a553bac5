"""Which images nobody has used for long."""

from __future__ import annotations

from collections.abc import Iterable

from vmruntime.model.image import Image


def last_use(image: Image) -> int:
    """Return when an image was last used, in nanoseconds since the epoch; before anybody noted it, when it came."""
    return max(image.last_used_at, image.created_at)


def stale(images: Iterable[Image], in_use: set[str], before_ns: int) -> list[Image]:
    """Return the images to remove, the longest unused first.

    Args:
        images: All of them.
        in_use: Ids that containers have.
        before_ns: Those used since then stay.
    """
    found = [one for one in images if not one.pinned and one.id not in in_use and last_use(one) <= before_ns]
    return sorted(found, key=lambda image: (last_use(image), image.id))


def bytes_of(images: Iterable[Image], layers_needed: set[str], disks_needed: set[str]) -> int:
    """Return what the layers and disks of some images take, those left out that are needed elsewhere.

    Args:
        images: Which.
        layers_needed: DiffIDs.
        disks_needed: Digests of disks.
    """
    listed = list(images)
    layers = {layer.diff_id: layer.size for one in listed for layer in one.layers}
    disks = {one.disk.digest: one.disk.file_size for one in listed if one.disk is not None}
    return sum(size for diff_id, size in layers.items() if diff_id not in layers_needed) + sum(
        size for digest, size in disks.items() if digest not in disks_needed
    )
