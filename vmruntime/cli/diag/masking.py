"""What of a pod and of the configuration may be shown to strangers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmruntime.cri.translate.image_pod import PREFIX, VIRTLET_PREFIX
from vmruntime.images.endpoint import redacted

OURS = frozenset(
    {
        "kind", "created-by", "vcpus", "cpu-model", "libvirt-cpu", "disk-driver", "root-volume-size", "system-uuid",
        "firmware", "tpm", "vnc", "cloud-init-image-type", "cloud-init-user-data-overwrite", "force-dhcp-network-config",
        "chown-mounts", "ssh-key-source", "cloud-init-user-data-source", "cloud-init-user-data-source-key",
        "cloud-init-user-data-source-encoding", "files-from-data-source",
    }
)  # fmt: skip
VIRTLETS = frozenset(
    {
        "VCPUCount", "CPUModel", "LibvirtCPUSetting", "DiskDriver", "RootVolumeSize", "SystemUUID", "CloudInitImageType",
        "CloudInitUserDataOverwrite", "ForceDHCPNetworkConfig", "Chown9pfsMounts", "SSHKeySource",
        "CloudInitUserDataSource", "CloudInitUserDataSourceKey", "CloudInitUserDataSourceEncoding",
        "FilesFromDataSource",
    }
)  # fmt: skip
OTHERS = frozenset(
    {"kubernetes.io/target-runtime", "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"}
)
SHOWN = OTHERS | {PREFIX + name for name in OURS} | {VIRTLET_PREFIX + name for name in VIRTLETS}
"""Annotations whose values are no secrets. Others may be anything: the whole pod, say, as kubectl applied it."""

_SECRET_WORDS = ("password", "secret", "token", "credential", "header")


def shown_annotations(values: Mapping[str, str]) -> dict[str, str]:
    """Return annotations, those with values that may be secrets by their size."""
    return {name: value if name in SHOWN else _size(value) for name, value in values.items()}


def status(shown: dict[str, Any]) -> dict[str, Any]:
    """Return a pod's or container's status, as JSON has it, fit for strangers."""
    return {**shown, "annotations": shown_annotations(shown.get("annotations") or {})}


def info(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return a verbose status's info without what containers run, whose arguments may be secrets."""
    inner = shown.get("info")
    if not isinstance(inner, dict):
        return dict(shown)
    hidden = {name: f"<{len(inner[name])} words>" for name in ("command", "args") if inner.get(name)}
    return {**shown, "info": {**inner, **hidden}}


def settings(value: Any, name: str = "") -> Any:
    """Return the configuration with passwords hidden; names of files that hold secrets are none."""
    if isinstance(value, dict):
        return {key: settings(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [settings(item, name) for item in value]
    if isinstance(value, str):
        return _size(value) if value and any(word in name.lower() for word in _SECRET_WORDS) else redacted(value)
    return value


def _size(value: str) -> str:
    return f"<{len(value)} characters>"
