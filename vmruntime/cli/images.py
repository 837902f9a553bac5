"""Images, as the commands use them: what is here, what has to be pulled, what a file on disk is called."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

from vmruntime.cli.client import Client
from vmruntime.cli.progress import working
from vmruntime.errors import InvalidArgument, NotFound
from vmruntime.generated import cri_pb2
from vmruntime.ids import short_id

TRANSPORTS = ("oci", "oci-archive", "docker-archive")
"""What an image on this machine's disk begins with; the daemon takes these in PullImage, with absolute paths."""


def local_source(text: str) -> str | None:
    """Return `text` with an absolute path if it names an image by transport and path, else None."""
    transport, colon, rest = text.partition(":")
    if not colon or transport not in TRANSPORTS or not rest:
        return None
    # A tag may follow: oci:PATH:TAG.
    return f"{transport}:{os.path.abspath(rest)}"


def recognise(text: str) -> str:
    """Return the transport and absolute path of an image on disk, given with or without its transport.

    Raises:
        NotFound: There is no such file.
        InvalidArgument: It is neither an OCI layout nor an archive of an image.
    """
    known = local_source(text)
    if known is not None:
        return known
    path = Path(text).absolute()
    if not path.exists():
        raise NotFound(f"{path}: no such file or directory")
    if path.is_dir():
        if (path / "oci-layout").is_file():
            return f"oci:{path}"
        raise InvalidArgument(f"{path}: not an OCI image layout: it has no oci-layout file")
    names = _archive_names(path)
    if "oci-layout" in names:
        return f"oci-archive:{path}"
    if "manifest.json" in names:
        return f"docker-archive:{path}"
    raise InvalidArgument(
        f"{path}: an archive, but not of an image: it has neither oci-layout nor manifest.json",
        remedy="make one with: skopeo copy … oci-archive:FILE, or docker save",
    )


def _archive_names(path: Path) -> set[str]:
    try:
        with tarfile.open(path) as archive:
            return {name.removeprefix("./") for name in archive.getnames()}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidArgument(f"{path}: not a tar archive: {error}") from None


def find(client: Client, reference: str) -> cri_pb2.Image | None:
    """Return an image of this machine by reference, id or the start of an id; None: there is none.

    Raises:
        InvalidArgument: Several ids begin so.
    """
    spec = cri_pb2.ImageSpec(image=reference)
    answer = client.call(client.image.ImageStatus, cri_pb2.ImageStatusRequest(image=spec))
    if answer.HasField("image") and answer.image.id:
        return answer.image
    start = reference.removeprefix("sha256:")
    if not start or set(start) - set("0123456789abcdef"):
        return None
    images = client.call(client.image.ListImages, cri_pb2.ListImagesRequest()).images
    found = [image for image in images if image.id.removeprefix("sha256:").startswith(start)]
    if len(found) > 1:
        candidates = ", ".join(short_image_id(image.id) for image in found)
        raise InvalidArgument(f"{reference!r} may be any of: {candidates}", remedy="give more of the id")
    return found[0] if found else None


def require(client: Client, reference: str) -> cri_pb2.Image:
    """Return an image of this machine.

    Raises:
        NotFound: There is none of that name.
    """
    image = find(client, reference)
    if image is None:
        raise NotFound(f"no image {reference!r} on this machine", remedy="vmruntime image list shows them")
    return image


def pull(
    client: Client,
    reference: str,
    *,
    auth: cri_pb2.AuthConfig | None = None,
    sandbox: cri_pb2.PodSandboxConfig | None = None,
    while_waiting: Callable[[], None] = lambda: None,
) -> str:
    """Pull or import an image and return the reference it has here."""
    request = cri_pb2.PullImageRequest(
        image=cri_pb2.ImageSpec(image=reference, user_specified_image=reference), auth=auth, sandbox_config=sandbox
    )
    verb = "importing" if local_source(reference) else "pulling"
    with working(f"{verb} {reference}"):
        return client.call(client.image.PullImage, request, while_waiting=while_waiting).image_ref


def ensure(
    client: Client,
    reference: str,
    policy: str,
    sandbox: cri_pb2.PodSandboxConfig,
    while_waiting: Callable[[], None],
) -> str:
    """Return the reference under which an image can be run, pulled where the policy says so.

    Args:
        client: The daemon.
        reference: What the user typed.
        policy: "always", "missing" or "never".
        sandbox: The pod it is for.
        while_waiting: See Client.call().

    Raises:
        NotFound: It is not here, and the policy is "never".
    """
    source = local_source(reference)
    if source is None and policy != "always":
        here = find(client, reference)
        if here is not None:
            return here.id
    if policy == "never":
        raise NotFound(f"image {reference!r} is not on this machine", remedy="pull it, or leave out --pull never")
    return pull(client, source or reference, sandbox=sandbox, while_waiting=while_waiting)


def short_image_id(image_id: str) -> str:
    """Return the first digits of an image's id, without the name of the hash."""
    return short_id(image_id.removeprefix("sha256:"))
