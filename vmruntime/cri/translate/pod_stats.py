"""What whole pods use."""

from __future__ import annotations

from collections.abc import Sequence

from vmruntime.cri.translate.stats import stats_to_cri, unsigned
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Container
from vmruntime.model.sandbox import Sandbox, SandboxKind
from vmruntime.model.stats import HostUsage, InterfaceUsage, SandboxUsage

DEFAULT_INTERFACE = "eth0"


def pod_stats_to_cri(
    sandbox: Sandbox, containers: Sequence[Container], usage: SandboxUsage | None, *, writable_mountpoint: str
) -> cri.PodSandboxStats:
    """Translate one pod's use; without a measurement (it is not ready) only its name is there.

    CPU and memory are the host's view of the pod, so a VM's own need is in them; containers are measured inside.
    """
    metadata = sandbox.spec.metadata
    attributes = cri.PodSandboxAttributes(
        id=sandbox.id,
        metadata=cri.PodSandboxMetadata(
            name=metadata.name, uid=metadata.uid, namespace=metadata.namespace, attempt=metadata.attempt
        ),
        labels=sandbox.spec.labels,
        annotations=sandbox.spec.annotations,
    )
    if usage is None:
        return cri.PodSandboxStats(attributes=attributes)
    measured = {one.id: one for one in usage.guest.containers}
    processes = usage.host.processes
    if sandbox.spec.kind is not SandboxKind.HOST:
        processes += sum(one.pids for one in usage.guest.containers)  # a VM's are not among the host's
    return cri.PodSandboxStats(
        attributes=attributes,
        linux=cri.LinuxPodSandboxStats(
            cpu=cri.CpuUsage(timestamp=usage.time, usage_core_nano_seconds=unsigned(usage.host.cpu_ns)),
            memory=_memory(usage.time, usage.host),
            network=_network(usage.time, usage.guest.interfaces),
            process=cri.ProcessUsage(timestamp=usage.time, process_count=unsigned(processes)),
            containers=[
                stats_to_cri(one, measured[one.id], writable_mountpoint=writable_mountpoint)
                for one in containers
                if one.id in measured
            ],
        ),
    )


def pod_interfaces(interfaces: Sequence[InterfaceUsage]) -> list[InterfaceUsage]:
    """Return the interfaces that lead out of the pod, the default one first."""
    outside = [one for one in interfaces if one.name != "lo"]
    return sorted(outside, key=lambda one: (one.name != DEFAULT_INTERFACE, one.name))


def _memory(time: int, host: HostUsage) -> cri.MemoryUsage:
    return cri.MemoryUsage(
        timestamp=time,
        working_set_bytes=unsigned(host.memory_working_set),
        usage_bytes=unsigned(host.memory_usage),
        rss_bytes=unsigned(host.memory_rss),
        page_faults=unsigned(host.page_faults),
        major_page_faults=unsigned(host.major_page_faults),
    )


def _network(time: int, interfaces: Sequence[InterfaceUsage]) -> cri.NetworkUsage:
    found = [
        cri.NetworkInterfaceUsage(
            name=one.name,
            rx_bytes=unsigned(one.rx_bytes),
            rx_errors=unsigned(one.rx_errors),
            tx_bytes=unsigned(one.tx_bytes),
            tx_errors=unsigned(one.tx_errors),
        )
        for one in pod_interfaces(interfaces)
    ]
    return cri.NetworkUsage(timestamp=time, default_interface=found[0] if found else None, interfaces=found)
