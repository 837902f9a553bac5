"""What an agent says of its guest's use, checked and translated."""

from __future__ import annotations

from vmruntime.agent import checks
from vmruntime.generated import agent_pb2
from vmruntime.model.stats import ContainerUsage, GuestUsage, InterfaceUsage, Pressure

MOST_INTERFACES = 64


def guest_usage(message: agent_pb2.StatsResponse) -> GuestUsage:
    """Return a guest's numbers.

    Raises:
        AgentLied: A name or the time is none.
    """
    time = checks.number(message.time_unix_ns, "the time", 0, checks.NS_LIMIT)
    return GuestUsage(
        time=time,
        containers=[_container(one, time) for one in message.containers],
        interfaces=[_interface(one) for one in message.network[:MOST_INTERFACES]],
        memory_total=message.guest_memory_total_bytes,
        memory_available=message.guest_memory_available_bytes,
        scratch_bytes=message.scratch_total_bytes,
        scratch_inodes=message.scratch_inodes,
        scratch_inodes_free=message.scratch_inodes_free,
    )


def _container(message: agent_pb2.ContainerStats, time: int) -> ContainerUsage:
    return ContainerUsage(
        id=checks.text(message.id, "a container's id", 128),
        time=time,
        cpu_ns=message.cpu_usage_ns,
        memory_usage=message.memory_usage_bytes,
        memory_working_set=message.memory_working_set_bytes,
        memory_rss=message.memory_rss_bytes,
        memory_limit=message.memory_limit_bytes,
        page_faults=message.memory_page_faults,
        major_page_faults=message.memory_major_page_faults,
        swap_usage=message.swap_usage_bytes,
        pids=message.pids,
        writable_bytes=message.writable_layer_bytes,
        writable_inodes=message.writable_layer_inodes,
        cpu_user_ns=message.cpu_user_ns,
        cpu_system_ns=message.cpu_system_ns,
        cpu_periods=message.cpu_periods,
        cpu_throttled_periods=message.cpu_throttled_periods,
        cpu_throttled_ns=message.cpu_throttled_ns,
        memory_cache=message.memory_cache_bytes,
        memory_mapped_file=message.memory_mapped_file_bytes,
        memory_kernel=message.memory_kernel_bytes,
        memory_peak=message.memory_peak_bytes,
        memory_limit_hits=message.memory_limit_hits,
        oom_kills=message.oom_kills,
        pids_limit=message.pids_limit,
        processes=message.processes,
        open_files=message.open_files,
        open_sockets=message.open_sockets,
        io_read_bytes=message.io_read_bytes,
        io_write_bytes=message.io_write_bytes,
        io_reads=message.io_reads,
        io_writes=message.io_writes,
        cpu_pressure=_pressure(message.cpu_pressure) if message.HasField("cpu_pressure") else None,
        memory_pressure=_pressure(message.memory_pressure) if message.HasField("memory_pressure") else None,
        io_pressure=_pressure(message.io_pressure) if message.HasField("io_pressure") else None,
    )


def _pressure(message: agent_pb2.Pressure) -> Pressure:
    return Pressure(waiting_us=message.waiting_us, stalled_us=message.stalled_us)


def _interface(message: agent_pb2.NetworkStats) -> InterfaceUsage:
    return InterfaceUsage(
        name=checks.text(message.name, "an interface's name", 15),
        rx_bytes=message.rx_bytes,
        rx_errors=message.rx_errors,
        rx_packets=message.rx_packets,
        rx_dropped=message.rx_dropped,
        tx_bytes=message.tx_bytes,
        tx_errors=message.tx_errors,
        tx_packets=message.tx_packets,
        tx_dropped=message.tx_dropped,
    )
