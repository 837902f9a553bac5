"""Names of image archives on this host: oci:DIR[:REF], oci-archive:FILE[:REF], docker-archive:FILE[:REF]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vmruntime.errors import InvalidArgument
from vmruntime.images import reference as references
from vmruntime.images.reference import Reference

TRANSPORTS = ("oci", "oci-archive", "docker-archive")


@dataclasses.dataclass(frozen=True)
class Archive:
    """Where an archive is and which of its images is meant.

    Attributes:
        source: As skopeo takes it.
        path: Absolute.
        selector: The part after the path; empty when there is one image.
    """

    source: str
    path: str
    selector: str

    def names(self, given: list[str], resolve: Callable[[str], Reference] = references.parse) -> list[Reference]:
        """Return the names the image is to have: those given, else the one that selects it.

        Args:
            given: As people write them.
            resolve: Makes them full.

        Raises:
            InvalidArgument: There is none, or one is no reference or has a digest.
        """
        chosen = given or ([self.selector] if self.selector else [])
        if not chosen:
            raise InvalidArgument.field("source", self.source, "does not say the image's name", remedy="give a name")
        names = [resolve(name) for name in chosen]
        for name in names:
            if name.digest:
                raise InvalidArgument.field(
                    "name", str(name), "has a digest; an archive has no repository to vouch for it"
                )
        return names


def parse(source: str) -> Archive:
    """Read the name of an archive.

    Raises:
        InvalidArgument: It has another transport or a path that is not absolute.
    """
    transport, _, rest = source.partition(":")
    if transport not in TRANSPORTS:
        raise InvalidArgument.field("source", source, f"does not begin with one of {', '.join(TRANSPORTS)} and a colon")
    path, _, selector = rest.partition(":")
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument.field("source", source, "has a path that is not absolute")
    return Archive(source, path, selector)
