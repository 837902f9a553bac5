"""Images, as the commands use them: what is here, what has to be pulled, what a file on disk is called."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from vmruntime.cli.client import Client
from vmruntime.cli.progress import working
from vmruntime.cli.render import size
from vmruntime.cri.translate.image import DISK_FORMAT_ANNOTATION, DISK_SIZE_ANNOTATION
from vmruntime.errors import InvalidArgument, NotFound, Unimplemented
from vmruntime.generated import cri_pb2, maintenance_pb2
from vmruntime.ids import short_id
from vmruntime.images.endpoint import redacted

TRANSPORTS = ("oci", "oci-archive", "docker-archive")
"""What an image on this machine's disk begins with; the daemon takes these in PullImage, with absolute paths."""

REF_NAME = "org.opencontainers.image.ref.name"
"""The annotation that names an image in an OCI layout (OCI image specification, annotations)."""

DISK_MAGIC = (b"QFI\xfb", b"KDMV")
"""What qcow2 and vmdk files begin with."""

RAW_SUFFIXES = (".raw", ".img")

INDEX_LIMIT = 4 * 1024 * 1024
"""Bytes of an index that are read; registries take no larger ones."""


def local_source(text: str) -> str | None:
    """Return what the daemon is told of an image on disk, or None if `text` does not begin with a transport.

    The path is made absolute, and where the file holds a single image, its name is added: the daemon calls it so.

    Raises:
        InvalidArgument: No name is given, and the file has none or several.
    """
    transport, colon, rest = text.partition(":")
    if not colon or transport not in TRANSPORTS or not rest:
        return None
    path_text, _, name = rest.partition(":")
    path = os.path.abspath(path_text)
    if not name:
        name = _only_name(transport, Path(path))
    return f"{transport}:{path}:{name}"


def recognise(text: str) -> str:
    """Return what the daemon is told of an image on disk, given with or without its transport; a VM's disk: its URL.

    Raises:
        NotFound: There is no such file.
        InvalidArgument: It is neither an OCI layout nor an archive of an image, or the name is missing.
    """
    known = local_source(text)
    if known is not None:
        return known
    path = Path(text).absolute()
    if not path.exists():
        raise NotFound(f"{path}: no such file or directory")
    if path.is_dir():
        if not (path / "oci-layout").is_file():
            raise InvalidArgument(f"{path}: not an OCI image layout: it has no oci-layout file")
        transport = "oci"
    elif _is_disk(path):
        return path.as_uri()
    elif _read_member(path, "oci-layout") is not None:
        transport = "oci-archive"
    elif _read_member(path, "manifest.json") is not None:
        transport = "docker-archive"
    else:
        raise InvalidArgument(
            f"{path}: an archive, but not of an image: it has neither oci-layout nor manifest.json",
            remedy="make one with: skopeo copy … oci-archive:FILE:NAME, or docker save",
        )
    return f"{transport}:{path}:{_only_name(transport, path)}"


def _is_disk(path: Path) -> bool:
    """Whether a file is the disk of a VM: by its first bytes, or, since raw disks have none of their own, by its name."""
    if path.suffix in RAW_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) in DISK_MAGIC
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror}") from None


def _only_name(transport: str, path: Path) -> str:
    """Return the name of the one image in a file.

    Raises:
        InvalidArgument: It has none or several.
    """
    try:
        names = _names(transport, path)
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InvalidArgument(f"{path}: not an image: its index is malformed") from None
    if len(names) != 1:
        what = f"several images: {', '.join(names)}" if names else "an image without a name"
        raise InvalidArgument(
            f"{path} holds {what}",
            remedy=f"say which: {transport}:{path}:NAME"
            if names
            else "give it one: skopeo copy FROM oci-archive:FILE:NAME",
        )
    return names[0]


def _names(transport: str, path: Path) -> list[str]:
    if transport == "docker-archive":
        listed = json.loads(_read_member(path, "manifest.json") or b"[]")
        return [str(name) for image in listed for name in image["RepoTags"] or []]
    index = (path / "index.json").read_bytes() if transport == "oci" else _read_member(path, "index.json")
    manifests = json.loads(index or b"{}").get("manifests", [])
    names = [(manifest.get("annotations") or {}).get(REF_NAME) for manifest in manifests]
    return [str(name) for name in names if name]


def _read_member(path: Path, name: str) -> bytes | None:
    """Return a small file of a tar archive; None: it has none of that name."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.removeprefix("./") == name and member.isfile():
                    file = archive.extractfile(member)
                    return None if file is None else file.read(INDEX_LIMIT)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InvalidArgument(f"{path}: not a tar archive: {error}") from None
    return None


def find(client: Client, reference: str, annotations: Mapping[str, str] | None = None) -> cri_pb2.Image | None:
    """Return an image of this machine by reference, id or the start of an id; None: there is none.

    `annotations` are of the pod that it is for: an image pod's names are translated.

    Raises:
        InvalidArgument: Several ids begin so.
    """
    spec = cri_pb2.ImageSpec(image=reference, annotations=annotations)
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


def disk(image: cri_pb2.Image) -> str:
    """Return the format of a VM image's disk, and how large its guest sees it; empty: it is none."""
    told = image.spec.annotations
    form, bytes_ = told.get(DISK_FORMAT_ANNOTATION, ""), told.get(DISK_SIZE_ANNOTATION, "")
    return f"{form}, {size(int(bytes_))}" if form and bytes_.isdecimal() else form


def require(client: Client, reference: str) -> cri_pb2.Image:
    """Return an image of this machine.

    Raises:
        NotFound: There is none of that name.
    """
    image = find(client, reference)
    if image is None:
        raise NotFound(f"no image {reference!r} on this machine", remedy="vmruntime image list shows them")
    return image


def uses(client: Client) -> dict[str, maintenance_pb2.ImageUse]:
    """Return the use of each image by its id; empty when the daemon cannot tell (another runtime's, say)."""
    try:
        answer = client.call(client.maintenance.ListImageUse, maintenance_pb2.ListImageUseRequest())
    except Unimplemented:
        return {}
    return {use.id: use for use in answer.images}


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
    verb = "importing" if reference.partition(":")[0] in (*TRANSPORTS, "file") else "pulling"
    with working(f"{verb} {redacted(reference)}"):
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
        reference: Of a registry, or what local_source() returned.
        policy: "always", "missing" or "never".
        sandbox: The pod it is for.
        while_waiting: See Client.call().

    Raises:
        NotFound: It is not here, and the policy is "never".
    """
    on_disk = reference.partition(":")[0] in (*TRANSPORTS, "file")
    if not on_disk and policy != "always":
        here = find(client, reference, sandbox.annotations)
        if here is not None:
            return here.id
    if policy == "never":
        raise NotFound(f"image {reference!r} is not on this machine", remedy="pull it, or leave out --pull never")
    return pull(client, reference, sandbox=sandbox, while_waiting=while_waiting)


def short_image_id(image_id: str) -> str:
    """Return the first digits of an image's id, without the name of the hash."""
    return short_id(image_id.removeprefix("sha256:"))
