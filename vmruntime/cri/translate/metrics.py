"""Pod metrics for ListPodSandboxMetrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmruntime.cri.translate.metric_table import CONTAINER, NETWORK, SECOND, Metric, Of, Values, faults
from vmruntime.cri.translate.pod_stats import pod_interfaces
from vmruntime.cri.translate.stats import unsigned
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Container
from vmruntime.model.sandbox import Sandbox
from vmruntime.model.stats import HostUsage, SandboxUsage

LABELS = ("id", "name", "image", "namespace", "pod", "container")

# The host's view of the pod, a VM with its helpers, under names of containers, as cAdvisor has it for pod cgroups.
_POD: dict[str, Callable[[HostUsage], Values]] = {
    "container_cpu_usage_seconds_total": lambda host: [((), host.cpu_ns // SECOND)],
    "container_memory_usage_bytes": lambda host: [((), host.memory_usage)],
    "container_memory_working_set_bytes": lambda host: [((), host.memory_working_set)],
    "container_memory_rss": lambda host: [((), host.memory_rss)],
    "container_memory_failures_total": lambda host: faults(host.page_faults, host.major_page_faults),
    "container_processes": lambda host: [((), host.processes)],
}


def descriptors() -> list[cri.MetricDescriptor]:
    """Return what pod_metrics() can contain, each name once."""
    metrics: tuple[Metric, ...] = (*CONTAINER, *NETWORK)
    return [cri.MetricDescriptor(name=one.name, help=one.help, label_keys=[*LABELS, *one.labels]) for one in metrics]


def pod_metrics(sandbox: Sandbox, containers: Sequence[Container], usage: SandboxUsage) -> cri.PodSandboxMetrics:
    """Translate one pod's use. Label values come in the order of the descriptor's keys."""
    base = _labels(sandbox, sandbox.id, "", "")
    metrics = [
        _metric(one, base, more, value, usage.time)
        for one in CONTAINER
        if one.name in _POD
        for more, value in _POD[one.name](usage.host)
    ]
    metrics += [
        _metric(one, base, (interface.name,), one.read(interface), usage.time)
        for one in NETWORK
        for interface in pod_interfaces(usage.guest.interfaces)
    ]
    measured = {one.id: one for one in usage.guest.containers}
    return cri.PodSandboxMetrics(
        pod_sandbox_id=sandbox.id,
        metrics=metrics,
        container_metrics=[
            _container_metrics(sandbox, Of(one, measured[one.id], usage.guest), usage.time)
            for one in containers
            if one.id in measured
        ],
    )


def _container_metrics(sandbox: Sandbox, of: Of, time: int) -> cri.ContainerMetrics:
    spec = of.container.spec
    labels = _labels(sandbox, of.container.id, spec.user_image or spec.image, spec.metadata.name)
    return cri.ContainerMetrics(
        container_id=of.container.id,
        metrics=[_metric(one, labels, more, value, time) for one in CONTAINER for more, value in one.read(of)],
    )


def _labels(sandbox: Sandbox, identifier: str, image: str, container: str) -> list[str]:
    metadata = sandbox.spec.metadata
    return [identifier, identifier, image, metadata.namespace, metadata.name, container]


def _metric(one: Metric, labels: list[str], more: tuple[str, ...], value: int, time: int) -> cri.Metric:
    return cri.Metric(
        name=one.name, timestamp=time, metric_type=one.kind, label_values=[*labels, *more], value=unsigned(value)
    )
