"""Who runs image pods, as the settings and this host have it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import structlog

from vmruntime.aio.inotify import FileChanges
from vmruntime.clock import Clock
from vmruntime.config.settings import Settings
from vmruntime.hypervisor.interface import Hypervisor
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Sandbox
from vmruntime.paths import Paths
from vmruntime.pods.ports import Network, Tap
from vmruntime.sandboxes.image_vm.backend import ImageVmBackend
from vmruntime.sandboxes.image_vm.machine import MachineParts
from vmruntime.sandboxes.ledger import OwnedResources

log = structlog.get_logger(__name__)


def image_backend(
    hypervisor: Hypervisor,
    driver: str,
    settings: Settings,
    paths: Paths,
    owned: OwnedResources,
    network: Network,
    clock: Clock,
    host_memory_mib: int,
    stack: contextlib.AsyncExitStack,
) -> ImageVmBackend:
    """Return what runs image pods, and teach the ledger how their machines are released."""

    async def open_taps(sandbox: Sandbox) -> Sequence[Tap]:
        return await network.open_taps(sandbox)

    async def forget(resource: Resource) -> None:
        if resource.data["driver"] == driver:
            await hypervisor.forget(resource.key)
        else:
            log.warning("machine of another driver left to it", driver=resource.data["driver"], uuid=resource.key)

    owned.add_releaser(ResourceKind.MACHINE, forget)
    changes = FileChanges()
    stack.callback(changes.close)
    parts = MachineParts(
        hypervisor=hypervisor,
        driver=driver,
        owned=owned,
        paths=paths,
        settings=settings,
        clock=clock,
        changes=changes,
        open_taps=open_taps,
    )
    return ImageVmBackend(parts, host_memory_mib)
