"""Pulling images and making disks of them."""

from __future__ import annotations

import json
from pathlib import Path

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.programs import program
from vmruntime.cli.doctor.report import Capability, Check, degraded, found, missing
from vmruntime.config.settings import Settings
from vmruntime.errors import FailedPrecondition
from vmruntime.images.translation import load_directory

POLICIES = ("/etc/containers/policy.json", "/usr/share/containers/policy.json")
GNUPG = "apt install gnupg"
REGISTRIES = "/etc/containers/registries.conf"


def policy(host: Host, settings: Settings) -> Capability:
    """Whether a policy says which images to trust."""
    configured = settings.images.policy
    for path in (configured,) if configured else POLICIES:
        text = host.read(path)
        if text is None:
            continue
        try:
            json.loads(text)
        except ValueError as error:
            return missing("image policy", f"{path} is not JSON: {error}", "see containers-policy.json(5)")
        if '"signedBy"' in text and host.which("gpg") is None:
            return missing("image policy", f"{path} wants signatures; gpg, which checks them, is not installed", GNUPG)
        return found("image policy", path)
    if configured:
        return missing("image policy", f"{configured} cannot be read (images.policy)", "see containers-policy.json(5)")
    return degraded(
        "image policy",
        "no policy.json on this machine, so images are accepted unsigned",
        f"create {POLICIES[0]}, see containers-policy.json(5)",
    )


def registries(host: Host, settings: Settings) -> Capability:
    """Whether the registries configuration can be read."""
    path = settings.images.registries_conf
    if path:
        if host.read(path) is None:
            why = f"{path} cannot be read (images.registries_conf)"
            return missing("registries", why, "see containers-registries.conf(5)")
        return found("registries", path)
    if host.read(REGISTRIES) is None:
        return found("registries", "no registries.conf: names without a registry mean docker.io")
    return found("registries", REGISTRIES)


def translations(host: Host, settings: Settings) -> Capability:
    """Whether the names of VM images can be translated."""
    directory = Path(settings.images.translations_dir)
    try:
        rules = load_directory(directory)
    except FailedPrecondition as error:
        return missing("VM image names", error.message, error.remedy or "correct it", essential=False)
    return found("VM image names", f"{len(rules)} translations in {directory}")


CHECKS: tuple[Check, ...] = (
    program("skopeo", "pulls images", "skopeo"),
    program("mkfs.ext4", "makes pods' writable disks", "e2fsprogs"),
    program("unshare", "keeps what unpacks layers from the network", "util-linux"),
    program("zstd", "unpacks layers that are packed by it", "zstd", essential=False),
    policy,
    registries,
    program("qemu-img", "checks disks of VM images and makes those of image pods", "qemu-utils", essential=False),
    program("curl", "downloads VM images by URL", "curl", essential=False),
    program("prlimit", "keeps what reads disks of VM images within limits", "util-linux", essential=False),
    program("blkid", "tells a blank volume from one with data", "util-linux", essential=False),
    translations,
)
