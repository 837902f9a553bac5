"""The metrics of containers and of their network, under cAdvisor's names and with its labels.

Source: cAdvisor, docs/storage/prometheus.md. Values are whole numbers, as CRI's Metric has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Container
from vmruntime.model.stats import ContainerUsage, GuestUsage, InterfaceUsage, Pressure

SECOND = 1_000_000_000
MICROSECONDS = 1_000_000
# A device of a guest has no name that means anything on the host: all of a container's are taken together.
ALL_DEVICES = "all"

Values = list[tuple[tuple[str, ...], int]]
"""What a metric says: values of its additional labels, and the number."""


class Of(NamedTuple):
    """A container, what it uses, and what its guest uses."""

    container: Container
    usage: ContainerUsage
    guest: GuestUsage


class Metric(msgspec.Struct, frozen=True):
    """One metric: name, cri.COUNTER or cri.GAUGE, what it says, label keys besides those that all have."""

    name: str
    kind: Any
    help: str
    labels: tuple[str, ...] = ()


class ContainerMetric(Metric, frozen=True, kw_only=True):
    """A metric of a container; without values it is not measured here."""

    read: Callable[[Of], Values]


class InterfaceMetric(Metric, frozen=True, kw_only=True):
    """A metric of an interface of the pod."""

    read: Callable[[InterfaceUsage], int]


def seconds(name: str, kind: Any, text: str, read: Callable[[Of], int]) -> ContainerMetric:
    """Return a metric whose number is read as nanoseconds."""
    return ContainerMetric(name, kind, text, read=lambda of: [((), read(of) // SECOND)])


def counter(name: str, text: str, read: Callable[[Of], int]) -> ContainerMetric:
    """Return a metric that only grows."""
    return ContainerMetric(name, cri.COUNTER, text, read=lambda of: [((), read(of))])


def gauge(name: str, text: str, read: Callable[[Of], int]) -> ContainerMetric:
    """Return a metric that goes up and down."""
    return ContainerMetric(name, cri.GAUGE, text, read=lambda of: [((), read(of))])


def faults(minor: int, major: int) -> Values:
    """Return page faults under the labels failure_type and scope."""
    return [(("pgfault", "container"), minor), (("pgmajfault", "container"), major)]


def _io(name: str, text: str, read: Callable[[Of], int]) -> ContainerMetric:
    return ContainerMetric(name, cri.COUNTER, text, ("device",), read=lambda of: [((ALL_DEVICES,), read(of))])


def _device_usage(of: Of) -> Values:
    use = of.usage
    return [((ALL_DEVICES, "", "", "Read"), use.io_read_bytes), ((ALL_DEVICES, "", "", "Write"), use.io_write_bytes)]


def _pressure(
    name: str, text: str, read: Callable[[ContainerUsage], Pressure | None], value: Callable[[Pressure], int]
) -> ContainerMetric:
    def values(of: Of) -> Values:
        found = read(of.usage)
        return [] if found is None else [((), value(found) // MICROSECONDS)]

    return ContainerMetric(f"container_pressure_{name}_seconds_total", cri.COUNTER, text, read=values)


def _waiting(pressure: Pressure) -> int:
    return pressure.waiting_us


def _stalled(pressure: Pressure) -> int:
    return pressure.stalled_us


CPU = (
    seconds("container_cpu_usage_seconds_total", cri.COUNTER, "CPU time used", lambda of: of.usage.cpu_ns),
    seconds("container_cpu_user_seconds_total", cri.COUNTER, "CPU time in user mode", lambda of: of.usage.cpu_user_ns),
    seconds(
        "container_cpu_system_seconds_total", cri.COUNTER, "CPU time in the kernel", lambda of: of.usage.cpu_system_ns
    ),
    counter("container_cpu_cfs_periods_total", "Periods of the CPU quota", lambda of: of.usage.cpu_periods),
    counter(
        "container_cpu_cfs_throttled_periods_total",
        "Periods that ended throttled",
        lambda of: of.usage.cpu_throttled_periods,
    ),
    seconds(
        "container_cpu_cfs_throttled_seconds_total", cri.COUNTER, "Time throttled", lambda of: of.usage.cpu_throttled_ns
    ),
    _pressure("cpu_waiting", "Time some tasks waited for a CPU", lambda use: use.cpu_pressure, _waiting),
    _pressure("cpu_stalled", "Time all tasks waited for a CPU", lambda use: use.cpu_pressure, _stalled),
)

MEMORY = (
    gauge("container_memory_usage_bytes", "Memory in use, caches included", lambda of: of.usage.memory_usage),
    gauge(
        "container_memory_working_set_bytes", "Memory not reclaimable at once", lambda of: of.usage.memory_working_set
    ),
    gauge("container_memory_rss", "Anonymous memory, bytes", lambda of: of.usage.memory_rss),
    gauge("container_memory_cache", "Page cache, bytes", lambda of: of.usage.memory_cache),
    gauge("container_memory_mapped_file", "Mapped files, bytes", lambda of: of.usage.memory_mapped_file),
    gauge("container_memory_kernel_usage", "Memory of the kernel, bytes", lambda of: of.usage.memory_kernel),
    gauge("container_memory_swap", "Swap in use, bytes", lambda of: of.usage.swap_usage),
    gauge("container_memory_max_usage_bytes", "The most memory used so far", lambda of: of.usage.memory_peak),
    counter("container_memory_failcnt", "How often the limit was met", lambda of: of.usage.memory_limit_hits),
    ContainerMetric(
        "container_memory_failures_total",
        cri.COUNTER,
        "Page faults by type",
        ("failure_type", "scope"),
        read=lambda of: faults(of.usage.page_faults, of.usage.major_page_faults),
    ),
    counter("container_oom_events_total", "Processes taken for want of memory", lambda of: of.usage.oom_kills),
    _pressure("memory_waiting", "Time some tasks waited for memory", lambda use: use.memory_pressure, _waiting),
    _pressure("memory_stalled", "Time all tasks waited for memory", lambda use: use.memory_pressure, _stalled),
)

PROCESSES = (
    gauge("container_processes", "Processes", lambda of: of.usage.processes),
    gauge("container_threads", "Processes and threads", lambda of: of.usage.pids),
    gauge("container_threads_max", "Limit of processes and threads; 0: none", lambda of: of.usage.pids_limit),
    gauge("container_file_descriptors", "Open descriptors", lambda of: of.usage.open_files),
    gauge("container_sockets", "Open sockets", lambda of: of.usage.open_sockets),
)

DISK = (
    gauge("container_fs_usage_bytes", "Bytes the writable layer takes", lambda of: of.usage.writable_bytes),
    gauge("container_fs_limit_bytes", "Bytes the pod's writable layers can take", lambda of: of.guest.scratch_bytes),
    gauge("container_fs_inodes_total", "Inodes of the pod's writable layers", lambda of: of.guest.scratch_inodes),
    gauge("container_fs_inodes_free", "Of these, unused", lambda of: of.guest.scratch_inodes_free),
    _io("container_fs_reads_bytes_total", "Bytes read", lambda of: of.usage.io_read_bytes),
    _io("container_fs_writes_bytes_total", "Bytes written", lambda of: of.usage.io_write_bytes),
    _io("container_fs_reads_total", "Reads", lambda of: of.usage.io_reads),
    _io("container_fs_writes_total", "Writes", lambda of: of.usage.io_writes),
    ContainerMetric(
        "container_blkio_device_usage_total",
        cri.COUNTER,
        "Bytes by operation",
        ("device", "major", "minor", "operation"),
        read=_device_usage,
    ),
    _pressure("io_waiting", "Time some tasks waited for disks", lambda use: use.io_pressure, _waiting),
    _pressure("io_stalled", "Time all tasks waited for disks", lambda use: use.io_pressure, _stalled),
)

SPEC = (
    gauge("container_spec_memory_limit_bytes", "0: none", lambda of: of.container.spec.resources.memory_limit),
    gauge(
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap together; 0: none",
        lambda of: max(0, of.container.spec.resources.memory_swap_limit),
    ),
    gauge("container_spec_cpu_shares", "CPU shares", lambda of: of.container.spec.resources.cpu_shares),
    gauge(
        "container_spec_cpu_quota",
        "Microseconds a period; 0: none",
        lambda of: max(0, of.container.spec.resources.cpu_quota),
    ),
    gauge("container_spec_cpu_period", "Microseconds", lambda of: of.container.spec.resources.cpu_period),
    seconds("container_start_time_seconds", cri.GAUGE, "Since the epoch", lambda of: of.container.started_at),
    seconds("container_last_seen", cri.GAUGE, "When this was measured, since the epoch", lambda of: of.usage.time),
)

CONTAINER = (*CPU, *MEMORY, *PROCESSES, *DISK, *SPEC)


def _interface(name: str, text: str, read: Callable[[InterfaceUsage], int]) -> InterfaceMetric:
    return InterfaceMetric(f"container_network_{name}_total", cri.COUNTER, text, ("interface",), read=read)


NETWORK = (
    _interface("receive_bytes", "Bytes received", lambda one: one.rx_bytes),
    _interface("receive_packets", "Packets received", lambda one: one.rx_packets),
    _interface("receive_packets_dropped", "Packets dropped on arrival", lambda one: one.rx_dropped),
    _interface("receive_errors", "Errors while receiving", lambda one: one.rx_errors),
    _interface("transmit_bytes", "Bytes sent", lambda one: one.tx_bytes),
    _interface("transmit_packets", "Packets sent", lambda one: one.tx_packets),
    _interface("transmit_packets_dropped", "Packets dropped before they were sent", lambda one: one.tx_dropped),
    _interface("transmit_errors", "Errors while sending", lambda one: one.tx_errors),
)
