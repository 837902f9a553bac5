"""Images and the credentials to pull them."""

from __future__ import annotations

import json

import msgspec

from vmruntime.cri.ports import FsUsage
from vmruntime.cri.translate.checks import ID_LIMIT, missing, required
from vmruntime.cri.translate.sandbox import asked_kind
from vmruntime.errors import InvalidArgument
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.image import Image, RegistryAuth
from vmruntime.model.sandbox import SandboxKind

DISK_FORMAT_ANNOTATION = "vmruntime.io/disk-format"
DISK_SIZE_ANNOTATION = "vmruntime.io/disk-size"
"""Bytes that a guest sees."""

# Registry tokens are large, but not this large.
_CREDENTIAL_LIMIT = 1024 * 1024


def reference_from_cri(spec: cri.ImageSpec, *, given: bool) -> str:
    """Return the reference a request is about.

    Raises:
        InvalidArgument: There is none, or it cannot be one.
    """
    if not given:
        raise missing("image")
    return required("image.image", spec.image)


def wants_disk(spec: cri.ImageSpec, sandbox: cri.PodSandboxConfig | None = None) -> bool:
    """Whether an image is for an image pod, by the pod's annotations or its runtime handler (kubelet sends both).

    Raises:
        InvalidArgument: An annotation or the handler is unknown.
    """
    annotations = {**spec.annotations, **(sandbox.annotations if sandbox is not None else {})}
    asked = asked_kind(annotations, spec.runtime_handler)
    return asked is not None and asked[0] is SandboxKind.IMAGE


def auth_from_cri(request: cri.PullImageRequest) -> RegistryAuth | None:
    """Return the credentials of a pull; None when the request has none. Messages never show a value."""
    if not request.HasField("auth"):
        return None
    auth = request.auth
    fields = {
        "username": auth.username,
        "password": auth.password,
        "auth": auth.auth,
        "identity_token": auth.identity_token,
        "registry_token": auth.registry_token,
        "server_address": auth.server_address,
    }
    for name, value in fields.items():
        if "\0" in value or len(value) > _CREDENTIAL_LIMIT:
            raise InvalidArgument(f"auth.{name} contains a NUL character or is longer than {_CREDENTIAL_LIMIT}")
    return RegistryAuth(**fields) if any(fields.values()) else None


def image_to_cri(image: Image) -> cri.Image:
    """Translate an image.

    The image's user may be "user:group"; CRI wants the user, as a number if it is one.
    Neither means root to kubelet.
    """
    user = image.config.user.split(":", 1)[0]
    numeric = user.isascii() and user.isdigit() and len(user) <= 10 and int(user) <= ID_LIMIT
    return cri.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        # CRI wants more than 0, which an image without layers would have.
        size=max(image.size, 1),
        uid=cri.Int64Value(value=int(user)) if numeric else None,
        username="" if numeric else user,
        spec=_spec(image),
        pinned=image.pinned,
    )


def _spec(image: Image) -> cri.ImageSpec | None:
    """Return what CRI has no field for: that VMs boot an image, and what they see."""
    if image.disk is None:
        return None
    annotations = {DISK_FORMAT_ANNOTATION: image.disk.format, DISK_SIZE_ANNOTATION: str(image.disk.virtual_size)}
    return cri.ImageSpec(image=image.id, annotations=annotations)


def image_info(image: Image) -> dict[str, str]:
    """Return what `crictl inspecti` shows beside the status."""
    config = image.config
    info = {
        "id": image.id,
        "layers": [{"diff_id": layer.diff_id, "size": layer.size} for layer in image.layers],
        "disk": None if image.disk is None else msgspec.structs.asdict(image.disk),
        "created_at": image.created_at,
        "last_used_at": image.last_used_at,
        "imageSpec": {
            "config": {
                "Entrypoint": config.entrypoint,
                "Cmd": config.cmd,
                "Env": config.env,
                "WorkingDir": config.working_dir,
                "User": config.user,
                "StopSignal": config.stop_signal,
                "Labels": config.labels,
                "Volumes": config.volumes,
            }
        },
    }
    return {"info": json.dumps(info)}


def fs_usage_to_cri(usage: FsUsage, now_ns: int) -> cri.ImageFsInfoResponse:
    """Translate what images take.

    Writable layers lie on the same file system. kubelet takes two equal entries for "not split", and some versions take
    a missing second one for an error.
    """
    entry = cri.FilesystemUsage(
        timestamp=now_ns,
        fs_id=cri.FilesystemIdentifier(mountpoint=str(usage.mountpoint)),
        used_bytes=cri.UInt64Value(value=max(usage.used_bytes, 0)),
        inodes_used=cri.UInt64Value(value=max(usage.used_inodes, 0)),
    )
    return cri.ImageFsInfoResponse(image_filesystems=[entry], container_filesystems=[entry])
