"""The metrics endpoint of one daemon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from vmruntime.config.settings import MetricsSettings
from vmruntime.metrics.instruments import REGISTRY, StateCollector
from vmruntime.metrics.server import MetricsServer
from vmruntime.pods.registry import Registry


@contextmanager
def serve_metrics(settings: MetricsSettings, registry: Registry) -> Iterator[None]:
    """Serve metrics meanwhile, if the settings say where."""
    if not settings.address:
        yield
        return

    def states() -> tuple[dict[str, int], dict[str, int]]:
        pods = Counter(sandbox.state.value for sandbox in registry.sandboxes(hidden=True))
        containers = Counter(container.state.value for container in registry.containers(hidden=True))
        return pods, containers

    collector = StateCollector(states)
    REGISTRY.register(collector)
    try:
        server = MetricsServer(settings.address, settings.port, REGISTRY)
        try:
            yield
        finally:
            server.close()
    finally:
        REGISTRY.unregister(collector)
