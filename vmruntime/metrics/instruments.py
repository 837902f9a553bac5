"""What is measured, each instrument under its Prometheus name (https://prometheus.io/docs/practices/naming/)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

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
LEAKS = Counter(
    "vmruntime_leaks_total",
    "Owners of resources that nobody knew any more, found when the daemon started",
    registry=REGISTRY,
)


def observe_start(phases: dict[str, float]) -> None:
    """Count one sandbox's start; phases in milliseconds."""
    for phase, milliseconds in phases.items():
        START_PHASES.labels(phase).observe(milliseconds / 1000)


class StateCollector(Collector):
    """How many pods and containers there are in each state, counted when somebody asks."""

    def __init__(self, states: Callable[[], tuple[dict[str, int], dict[str, int]]]) -> None:
        """Take what counts pods and containers by state; it is called in another thread and must only read."""
        self._states = states

    def collect(self) -> Iterable[Metric]:
        """Count."""
        for name, counts in zip(("pods", "containers"), self._states(), strict=True):
            family = GaugeMetricFamily(f"vmruntime_{name}", f"{name.capitalize()} by state", labels=["state"])
            for state, count in sorted(counts.items()):
                family.add_metric([state], count)
            yield family
