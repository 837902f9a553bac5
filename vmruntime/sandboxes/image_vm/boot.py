"""How the machine of an image pod presents itself: name, UUID, firmware, processor."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

import msgspec

from vmruntime.aio.pipeline import in_thread
from vmruntime.hypervisor.firmware import find_ovmf
from vmruntime.hypervisor.interface import FirmwareBoot
from vmruntime.model.image_pod import Firmware, ImagePod
from vmruntime.model.sandbox import Sandbox

NAMESPACE = uuid.UUID("c9de5b04-cd15-4e4f-8f73-52608446ecee")
"""Of the UUIDs that are made of sandbox ids (RFC 9562, version 5); ours, and random."""

NAME_LIMIT = 100
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class Extras(msgspec.Struct, frozen=True, kw_only=True):
    """What helpers of a machine want it to have; see hypervisor.interface.FirmwareBoot."""

    oem_strings: list[str] = []
    tpm: Path | None = None


def image_pod(sandbox: Sandbox) -> ImagePod:
    """Return what a pod's annotations ask for."""
    return sandbox.spec.image_pod or ImagePod()


def machine_uuid(sandbox: Sandbox) -> str:
    """Return the UUID of a pod's machine: what an annotation says, else one that belongs to its id."""
    return image_pod(sandbox).system_uuid or str(uuid.uuid5(NAMESPACE, sandbox.id))


def machine_name(sandbox: Sandbox) -> str:
    """Return a name by which people find the pod among VMs: no two pods have the same."""
    metadata = sandbox.spec.metadata
    name = _NOT_IN_NAME.sub("-", f"{metadata.namespace}-{metadata.name}")[:NAME_LIMIT]
    return f"{name}-{sandbox.id[:8]}"


async def firmware_boot(sandbox: Sandbox, disks: Path, account: tuple[int, int], extras: Extras) -> FirmwareBoot:
    """Return how a pod's machine boots.

    Args:
        sandbox: The pod.
        disks: Its directory of disks, where UEFI's variables are kept as long as the root disk.
        account: User and group of the VM.
        extras: From its helpers.

    Raises:
        FailedPrecondition: There is no UEFI firmware on this host.
    """
    pod = image_pod(sandbox)
    variables = None
    if pod.firmware is Firmware.UEFI:
        _, template = find_ovmf()
        variables = disks / "efivars.fd"
        await in_thread(lambda: _copy_once(template, variables, account))
    return FirmwareBoot(
        name=machine_name(sandbox),
        uuid=machine_uuid(sandbox),
        firmware=pod.firmware,
        variables=variables,
        host_cpu=pod.host_cpu,
        cpu=pod.cpu,
        oem_strings=extras.oem_strings,
        tpm=extras.tpm,
        vnc=pod.vnc,
    )


def _copy_once(template: Path, target: Path, account: tuple[int, int]) -> None:
    if target.exists():
        return
    part = target.with_suffix(".part")
    shutil.copyfile(template, part)
    part.chmod(0o600)
    os.chown(part, *account)
    part.replace(target)
