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
