"""What a container and its guest use."""

from __future__ import annotations

import msgspec


class Pressure(msgspec.Struct, frozen=True):
    """Microseconds lost for want of a resource (Documentation/accounting/psi.rst): by some tasks, and by all."""

    waiting_us: int
    stalled_us: int


class ContainerUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One container's use, bytes unless said otherwise, measured in the guest.

    Attributes:
        time: Nanoseconds since the epoch when it was read.
        cpu_ns: CPU time used since the container started, nanoseconds.
        cpu_periods: Periods of the CPU quota; of them cpu_throttled_periods ended throttled, cpu_throttled_ns long.
        memory_limit: 0 when there is none.
        memory_limit_hits: How often an allocation met the limit.
        pids: Processes and threads; pids_limit is 0 when there is none.
        open_files: Descriptors, sockets included.
        cpu_pressure, memory_pressure, io_pressure: None where the kernel does not measure it.
    """

    id: str
    time: int
    cpu_ns: int = 0
    memory_usage: int = 0
    memory_working_set: int = 0
    memory_rss: int = 0
    memory_limit: int = 0
    page_faults: int = 0
    major_page_faults: int = 0
    swap_usage: int = 0
    pids: int = 0
    writable_bytes: int = 0
    writable_inodes: int = 0
    cpu_user_ns: int = 0
    cpu_system_ns: int = 0
    cpu_periods: int = 0
    cpu_throttled_periods: int = 0
    cpu_throttled_ns: int = 0
    memory_cache: int = 0
    memory_mapped_file: int = 0
    memory_kernel: int = 0
    memory_peak: int = 0
    memory_limit_hits: int = 0
    oom_kills: int = 0
    pids_limit: int = 0
    processes: int = 0
    open_files: int = 0
    open_sockets: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    io_reads: int = 0
    io_writes: int = 0
    cpu_pressure: Pressure | None = None
    memory_pressure: Pressure | None = None
    io_pressure: Pressure | None = None


class InterfaceUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one interface since the pod started."""

    name: str
    rx_bytes: int = 0
    rx_errors: int = 0
    rx_packets: int = 0
    tx_bytes: int = 0
    tx_errors: int = 0
    tx_packets: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0


class HostUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a pod takes on the host: its VM, the VM's helpers, or its own processes. Bytes, nanoseconds."""

    cpu_ns: int = 0
    memory_usage: int = 0
    memory_working_set: int = 0
    memory_rss: int = 0
    page_faults: int = 0
    major_page_faults: int = 0
    processes: int = 0


class GuestUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent tells of its sandbox and the containers in it.

    Attributes:
        scratch_bytes, scratch_inodes, scratch_inodes_free: Of the file system that holds all writable layers.
    """

    time: int
    containers: list[ContainerUsage] = []
    interfaces: list[InterfaceUsage] = []
    memory_total: int = 0
    memory_available: int = 0
    scratch_bytes: int = 0
    scratch_inodes: int = 0
    scratch_inodes_free: int = 0


class SandboxUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox's use; `time` is nanoseconds since the epoch on the host's clock."""

    id: str
    time: int
    host: HostUsage
    guest: GuestUsage
