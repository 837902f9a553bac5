"""The CDI devices of one container, and what a VM cannot have of them."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import Any

import msgspec
import structlog

from vmruntime.errors import FailedPrecondition
from vmruntime.model.container import ContainerEdits, ContainerSpec, Device
from vmruntime.model.sandbox import Sandbox, SandboxKind
from vmruntime.pods.context import Context
from vmruntime.pods.oci.cdi import FIELD, resolve
from vmruntime.pods.oci.hooks import IN_CONTAINER

log = structlog.get_logger(__name__)

ON_HOST = "run the pod as a host pod (annotation vmruntime.io/kind: host)"


async def cdi_edits(context: Context, sandbox: Sandbox, spec: ContainerSpec) -> ContainerEdits:
    """Return what a container's CDI devices change of it.

    Raises:
        NotFound: A device is in no CDI file.
        FailedPrecondition: A device needs what cannot be had, in a VM for instance.
    """
    if not spec.cdi_devices:
        return ContainerEdits()
    edits = resolve(spec.cdi_devices, await asyncio.to_thread(context.load_cdi))
    if sandbox.spec.kind is SandboxKind.HOST:
        return edits
    await asyncio.to_thread(_check_devices, edits.devices)
    return _hooks_in_vm(context, edits)


def _check_devices(devices: list[Device]) -> None:
    """Refuse devices of the host other than block devices. Blocks."""
    for device in devices:
        try:
            mode = os.stat(device.host_path).st_mode
        except OSError as error:
            raise FailedPrecondition(
                f"{device.field} needs the device {device.host_path!r}: {error.strerror}",
                remedy="connect it, or correct the CDI file",
            ) from error
        if not stat.S_ISBLK(mode):
            kind = "character device" if stat.S_ISCHR(mode) else "named pipe" if stat.S_ISFIFO(mode) else "file"
            raise FailedPrecondition(
                f"{device.field} needs the {kind} {device.host_path!r} of the host, which cannot be had in a VM: only block"
                " devices can",
                remedy=ON_HOST,
            )


def _hooks_in_vm(context: Context, edits: ContainerEdits) -> ContainerEdits:
    """Refuse hooks of the host, or leave them out, as hooks_in_vms has it (adr/0004)."""
    outside = {stage: hooks for stage, hooks in edits.hooks.items() if stage != IN_CONTAINER}
    if not outside:
        return edits
    stages = ", ".join(sorted(outside))
    program = next(iter(outside.values()))[0]["path"]
    if not context.hooks.skip_in_vms:
        raise FailedPrecondition(
            f"{FIELD}: their CDI files have hooks ({stages}: {program}) that run programs of the host, which cannot be"
            " had in a VM",
            remedy=f'{ON_HOST}, or set hooks_in_vms = "skip"',
        )
    log.warning("hooks of CDI devices skipped: the container is in a VM", stages=stages, program=program)
    inside: dict[str, list[dict[str, Any]]] = {
        stage: hooks for stage, hooks in edits.hooks.items() if stage == IN_CONTAINER
    }
    return msgspec.structs.replace(edits, hooks=inside)
