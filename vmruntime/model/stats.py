"""What a container and its guest use."""

from __future__ import annotations

import msgspec


class ContainerUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One container's use, bytes unless said otherwise, measured in the guest.

    Attributes:
        time: Nanoseconds since the epoch when it was read.
        cpu_ns: CPU time used since the container started, nanoseconds.
        memory_limit: 0 when there is none.
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


class InterfaceUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one interface since the pod started."""

    name: str
    rx_bytes: int = 0
    rx_errors: int = 0
    rx_packets: int = 0
    tx_bytes: int = 0
    tx_errors: int = 0
    tx_packets: int = 0


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
    """What an agent tells of its sandbox and the containers in it."""

    time: int
    containers: list[ContainerUsage] = []
    interfaces: list[InterfaceUsage] = []
    memory_total: int = 0
    memory_available: int = 0


class SandboxUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox's use; `time` is nanoseconds since the epoch on the host's clock."""

    id: str
    time: int
    host: HostUsage
    guest: GuestUsage
