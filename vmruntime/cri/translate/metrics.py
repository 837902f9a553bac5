"""Pod metrics under cAdvisor's names (its docs/storage/prometheus.md), for ListPodSandboxMetrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from vmruntime.cri.translate.pod_stats import pod_interfaces
from vmruntime.cri.translate.stats import unsigned
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Container
from vmruntime.model.sandbox import Sandbox
from vmruntime.model.stats import ContainerUsage, HostUsage, InterfaceUsage, SandboxUsage

LABELS = ("id", "name", "image", "namespace", "pod", "container")
SECOND = 1_000_000_000


class _Metric(msgspec.Struct, frozen=True):
    """One metric: its name, its kind, what it says, more label keys, and how to read it."""

    name: str
    kind: Any
    help: str
    labels: tuple[str, ...] = ()


class _OfContainer(_Metric, frozen=True):
    read: Callable[[Container, ContainerUsage], list[tuple[tuple[str, ...], int]]] = lambda _c, _u: []


class _OfPod(_Metric, frozen=True):
    read: Callable[[HostUsage], list[tuple[tuple[str, ...], int]]] = lambda _h: []


class _OfInterface(_Metric, frozen=True):
    read: Callable[[InterfaceUsage], int] = lambda _i: 0


def _one(value: int) -> list[tuple[tuple[str, ...], int]]:
    return [((), value)]


def _faults(minor: int, major: int) -> list[tuple[tuple[str, ...], int]]:
    return [(("pgfault", "container"), minor), (("pgmajfault", "container"), major)]


_FAULT_LABELS = ("failure_type", "scope")

_CONTAINER = (
    _OfContainer(
        "container_cpu_usage_seconds_total",
        cri.COUNTER,
        "CPU time used, in seconds",
        (),
        lambda _c, u: _one(u.cpu_ns // SECOND),
    ),
    _OfContainer(
        "container_memory_usage_bytes",
        cri.GAUGE,
        "Memory in use, caches included",
        (),
        lambda _c, u: _one(u.memory_usage),
    ),
    _OfContainer(
        "container_memory_working_set_bytes",
        cri.GAUGE,
        "Memory in use that cannot be reclaimed at once",
        (),
        lambda _c, u: _one(u.memory_working_set),
    ),
    _OfContainer("container_memory_rss", cri.GAUGE, "Anonymous memory", (), lambda _c, u: _one(u.memory_rss)),
    _OfContainer("container_memory_swap", cri.GAUGE, "Swap in use, bytes", (), lambda _c, u: _one(u.swap_usage)),
    _OfContainer(
        "container_memory_failures_total",
        cri.COUNTER,
        "Page faults by type",
        _FAULT_LABELS,
        lambda _c, u: _faults(u.page_faults, u.major_page_faults),
    ),
    _OfContainer("container_processes", cri.GAUGE, "Processes and threads", (), lambda _c, u: _one(u.pids)),
    _OfContainer(
        "container_fs_usage_bytes",
        cri.GAUGE,
        "Bytes the writable layer takes",
        (),
        lambda _c, u: _one(u.writable_bytes),
    ),
    _OfContainer(
        "container_spec_memory_limit_bytes",
        cri.GAUGE,
        "Memory limit; 0: none",
        (),
        lambda c, _u: _one(c.spec.resources.memory_limit),
    ),
    _OfContainer(
        "container_spec_cpu_shares", cri.GAUGE, "CPU shares", (), lambda c, _u: _one(c.spec.resources.cpu_shares)
    ),
    _OfContainer(
        "container_spec_cpu_quota",
        cri.GAUGE,
        "CPU quota, microseconds a period",
        (),
        lambda c, _u: _one(max(0, c.spec.resources.cpu_quota)),
    ),
    _OfContainer(
        "container_spec_cpu_period",
        cri.GAUGE,
        "CPU period, microseconds",
        (),
        lambda c, _u: _one(c.spec.resources.cpu_period),
    ),
    _OfContainer(
        "container_start_time_seconds",
        cri.GAUGE,
        "Start, seconds since the epoch",
        (),
        lambda c, _u: _one(c.started_at // SECOND),
    ),
    _OfContainer(
        "container_last_seen",
        cri.GAUGE,
        "When this was measured, seconds since the epoch",
        (),
        lambda _c, u: _one(u.time // SECOND),
    ),
)

# The host's view of the pod: a VM with its helpers. The same names as for containers, as cAdvisor has it for pod cgroups.
_POD = (
    _OfPod("container_cpu_usage_seconds_total", cri.COUNTER, "", (), lambda h: _one(h.cpu_ns // SECOND)),
    _OfPod("container_memory_usage_bytes", cri.GAUGE, "", (), lambda h: _one(h.memory_usage)),
    _OfPod("container_memory_working_set_bytes", cri.GAUGE, "", (), lambda h: _one(h.memory_working_set)),
    _OfPod("container_memory_rss", cri.GAUGE, "", (), lambda h: _one(h.memory_rss)),
    _OfPod(
        "container_memory_failures_total",
        cri.COUNTER,
        "",
        _FAULT_LABELS,
        lambda h: _faults(h.page_faults, h.major_page_faults),
    ),
    _OfPod("container_processes", cri.GAUGE, "", (), lambda h: _one(h.processes)),
)

_NETWORK = (
    _OfInterface(
        "container_network_receive_bytes_total", cri.COUNTER, "Bytes received", ("interface",), lambda i: i.rx_bytes
    ),
    _OfInterface(
        "container_network_receive_packets_total",
        cri.COUNTER,
        "Packets received",
        ("interface",),
        lambda i: i.rx_packets,
    ),
    _OfInterface(
        "container_network_receive_errors_total",
        cri.COUNTER,
        "Errors while receiving",
        ("interface",),
        lambda i: i.rx_errors,
    ),
    _OfInterface(
        "container_network_transmit_bytes_total", cri.COUNTER, "Bytes sent", ("interface",), lambda i: i.tx_bytes
    ),
    _OfInterface(
        "container_network_transmit_packets_total", cri.COUNTER, "Packets sent", ("interface",), lambda i: i.tx_packets
    ),
    _OfInterface(
        "container_network_transmit_errors_total",
        cri.COUNTER,
        "Errors while sending",
        ("interface",),
        lambda i: i.tx_errors,
    ),
)


def descriptors() -> list[cri.MetricDescriptor]:
    """Return what pod_metrics() can contain, each name once."""
    metrics: tuple[_Metric, ...] = (*_CONTAINER, *_NETWORK)
    return [cri.MetricDescriptor(name=one.name, help=one.help, label_keys=[*LABELS, *one.labels]) for one in metrics]


def pod_metrics(sandbox: Sandbox, containers: Sequence[Container], usage: SandboxUsage) -> cri.PodSandboxMetrics:
    """Translate one pod's use. Label values come in the order of the descriptor's keys."""
    base = _labels(sandbox, sandbox.id, "", "")
    metrics = [_metric(one, base, more, value, usage.time) for one in _POD for more, value in one.read(usage.host)]
    metrics += [
        _metric(one, base, (interface.name,), one.read(interface), usage.time)
        for one in _NETWORK
        for interface in pod_interfaces(usage.guest.interfaces)
    ]
    measured = {one.id: one for one in usage.guest.containers}
    return cri.PodSandboxMetrics(
        pod_sandbox_id=sandbox.id,
        metrics=metrics,
        container_metrics=[
            _container_metrics(sandbox, one, measured[one.id], usage.time) for one in containers if one.id in measured
        ],
    )


def _container_metrics(
    sandbox: Sandbox, container: Container, usage: ContainerUsage, time: int
) -> cri.ContainerMetrics:
    spec = container.spec
    labels = _labels(sandbox, container.id, spec.user_image or spec.image, spec.metadata.name)
    return cri.ContainerMetrics(
        container_id=container.id,
        metrics=[
            _metric(one, labels, more, value, time) for one in _CONTAINER for more, value in one.read(container, usage)
        ],
    )


def _labels(sandbox: Sandbox, identifier: str, image: str, container: str) -> list[str]:
    metadata = sandbox.spec.metadata
    return [identifier, identifier, image, metadata.namespace, metadata.name, container]


def _metric(one: _Metric, labels: list[str], more: tuple[str, ...], value: int, time: int) -> cri.Metric:
    return cri.Metric(
        name=one.name, timestamp=time, metric_type=one.kind, label_values=[*labels, *more], value=unsigned(value)
    )
