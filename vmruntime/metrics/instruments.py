"""What is measured, each instrument under its Prometheus name (https://prometheus.io/docs/practices/naming/)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
LAGS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

REGISTRY = CollectorRegistry()
"""One daemon, one registry."""

OPERATIONS = Histogram(
    "vmruntime_cri_operation_seconds",
    "Duration of CRI calls by method and gRPC code",
    ["method", "code"],
    buckets=SECONDS,
    registry=REGISTRY,
)
START_PHASES = Histogram(
    "vmruntime_sandbox_start_seconds",
    "Duration of each phase of a sandbox's start",
    ["phase"],
    buckets=SECONDS,
    registry=REGISTRY,
)
STARTS = Counter(
    "vmruntime_sandbox_starts_total",
    "Sandboxes that started, by where their guest came from: warm, template, cold, or none of these",
    ["source"],
    registry=REGISTRY,
)
LOOP_LAG = Histogram(
    "vmruntime_event_loop_lag_seconds",
    "How late tasks of the daemon came to their turn, sampled",
    buckets=LAGS,
    registry=REGISTRY,
)
LEAKS = Counter(
    "vmruntime_leaks_total",
    "Owners of resources that nobody knew any more, found when the daemon started",
    registry=REGISTRY,
)
RELEASE_FAILURES = Counter(
    "vmruntime_release_failures_total",
    "Attempts to release what a pod that is gone had on the host that failed and will be repeated",
    registry=REGISTRY,
)
RECOVERED = Counter(
    "vmruntime_sandboxes_recovered_total",
    "Running sandboxes an earlier daemon left, by whether they were adopted or found gone",
    ["outcome"],
    registry=REGISTRY,
)
SANDBOX_DEATHS = Counter("vmruntime_sandbox_deaths_total", "Sandboxes that ended by themselves", registry=REGISTRY)
OOM_KILLS = Counter(
    "vmruntime_containers_oom_killed_total", "Containers that ran out of their memory limit", registry=REGISTRY
)
ProcessCollector(registry=REGISTRY)
for _outcome in ("adopted", "gone"):
    RECOVERED.labels(_outcome)


def observe_start(phases: dict[str, float], source: str) -> None:
    """Count one sandbox's start.

    Args:
        phases: In milliseconds.
        source: Where its guest came from; empty: it has none.
    """
    STARTS.labels(source or "none").inc()
    for phase, milliseconds in phases.items():
        START_PHASES.labels(phase).observe(milliseconds / 1000)


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What there is at one moment.

    Attributes:
        pods, containers: How many by state.
        images: How many.
        image_bytes: What their layers take on disk.
        tasks: Of the daemon's event loop.
        about: The daemon: its version, how guests run and are reached.
    """

    pods: dict[str, int] = {}
    containers: dict[str, int] = {}
    images: int = 0
    image_bytes: int = 0
    tasks: int = 0
    about: dict[str, str] = {}


class InventoryCollector(Collector):
    """What there is, counted when somebody asks."""

    def __init__(self, count: Callable[[], Inventory]) -> None:
        """Take what counts; it is called in another thread and must only read."""
        self._count = count

    def collect(self) -> Iterable[Metric]:
        """Count."""
        found = self._count()
        for name, counts in (("pods", found.pods), ("containers", found.containers)):
            family = GaugeMetricFamily(f"vmruntime_{name}", f"{name.capitalize()} by state", labels=["state"])
            for state, count in sorted(counts.items()):
                family.add_metric([state], count)
            yield family
        yield GaugeMetricFamily("vmruntime_images", "Images on this host", value=found.images)
        yield GaugeMetricFamily("vmruntime_image_bytes", "What images' layers take on disk", value=found.image_bytes)
        yield GaugeMetricFamily("vmruntime_tasks", "Tasks of the daemon's event loop", value=found.tasks)
        yield InfoMetricFamily("vmruntime", "The daemon: version, accelerator and vsock transport", value=found.about)
