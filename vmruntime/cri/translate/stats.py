"""What containers use."""

from __future__ import annotations

from vmruntime.cri.translate.container import metadata_to_cri
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Container
from vmruntime.model.stats import ContainerUsage


def unsigned(number: int) -> cri.UInt64Value:
    """Wrap a number; it comes from a guest, and a negative one must not make the whole answer fail."""
    return cri.UInt64Value(value=min(max(number, 0), 2**64 - 1))


def stats_to_cri(container: Container, usage: ContainerUsage | None, *, writable_mountpoint: str) -> cri.ContainerStats:
    """Translate one container's use; without a measurement (it is not running) only its name is there.

    CPU cores in use are left out: kubelet computes them from two measurements when a runtime gives none.
    """
    attributes = cri.ContainerAttributes(
        id=container.id,
        metadata=metadata_to_cri(container.spec.metadata),
        labels=container.spec.labels,
        annotations=container.spec.annotations,
    )
    if usage is None:
        return cri.ContainerStats(attributes=attributes)
    memory = cri.MemoryUsage(
        timestamp=usage.time,
        working_set_bytes=unsigned(usage.memory_working_set),
        usage_bytes=unsigned(usage.memory_usage),
        rss_bytes=unsigned(usage.memory_rss),
        page_faults=unsigned(usage.page_faults),
        major_page_faults=unsigned(usage.major_page_faults),
    )
    if usage.memory_limit > 0:
        memory.available_bytes.CopyFrom(unsigned(usage.memory_limit - usage.memory_working_set))
    return cri.ContainerStats(
        attributes=attributes,
        cpu=cri.CpuUsage(timestamp=usage.time, usage_core_nano_seconds=unsigned(usage.cpu_ns)),
        memory=memory,
        writable_layer=cri.FilesystemUsage(
            timestamp=usage.time,
            fs_id=cri.FilesystemIdentifier(mountpoint=writable_mountpoint),
            used_bytes=unsigned(usage.writable_bytes),
            inodes_used=unsigned(usage.writable_inodes),
        ),
        swap=cri.SwapUsage(timestamp=usage.time, swap_usage_bytes=unsigned(usage.swap_usage)),
    )
