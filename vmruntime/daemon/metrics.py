"""The metrics endpoint of one daemon."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from vmruntime import __version__
from vmruntime.config.settings import MetricsSettings
from vmruntime.daemon.parts import Driver
from vmruntime.images.service import ImageService
from vmruntime.metrics.instruments import REGISTRY, Inventory, InventoryCollector
from vmruntime.metrics.server import MetricsServer
from vmruntime.pods.registry import Registry


@contextmanager
def serve_metrics(
    settings: MetricsSettings, registry: Registry, images: ImageService, hypervisor: Driver
) -> Iterator[None]:
    """Serve metrics meanwhile, if the settings say where."""
    if not settings.address:
        yield
        return

    loop = asyncio.get_running_loop()

    def count() -> Inventory:
        # In a thread of the endpoint: these three copy what they have before they look at it.
        return Inventory(
            pods=Counter(sandbox.state.value for sandbox in registry.sandboxes(hidden=True)),
            containers=Counter(container.state.value for container in registry.containers(hidden=True)),
            images=len(images.list()),
            image_bytes=images.fs_usage().used_bytes,
            tasks=len(asyncio.all_tasks(loop)),
            about={
                "version": __version__,
                "accelerator": hypervisor.accelerator.value,
                "vsock": hypervisor.transport.value,
            },
        )

    collector = InventoryCollector(count)
    REGISTRY.register(collector)
    try:
        server = MetricsServer(settings.address, settings.port, REGISTRY)
        try:
            yield
        finally:
            server.close()
    finally:
        REGISTRY.unregister(collector)
