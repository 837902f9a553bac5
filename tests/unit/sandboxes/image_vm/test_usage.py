"""What an image pod uses, from what the kernel and the guest say."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vmruntime.model.sandbox import NetworkInterface
from vmruntime.model.stats import HostUsage
from vmruntime.sandboxes.image_vm.usage import counters, machine_usage

DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
vmrt-tap2:    111       2    3    4    0     0          0         0     555       6    7    8    0     0       0          0
"""
MIB = 1 << 20


def test_the_tap_sends_what_the_guest_receives() -> None:
    nic = NetworkInterface(name="eth0", mac="", mtu=1500, addresses=[], tap="vmrt-tap2")
    (found,) = counters(DEV, [nic])
    assert (found.name, found.rx_bytes, found.rx_packets, found.rx_errors, found.rx_dropped) == ("eth0", 555, 6, 7, 8)
    assert (found.tx_bytes, found.tx_packets, found.tx_errors, found.tx_dropped) == (111, 2, 3, 4)


def test_an_interface_without_a_tap_is_left_out() -> None:
    nic = NetworkInterface(name="eth1", mac="", mtu=1500, addresses=[], tap="vmrt-tap9")
    assert counters(DEV, [nic]) == []


def usage(memory: dict[str, int], root: Path = Path("/nowhere")) -> tuple[int, int]:
    found = machine_usage("c", 1, HostUsage(memory_usage=700, memory_working_set=600), memory, 512 * MIB, root)
    return found.memory_usage, found.memory_working_set


def test_memory_is_the_guests_own_view_where_it_has_one() -> None:
    memory = {
        "stat-total-memory": 480 * MIB,
        "stat-free-memory": 300 * MIB,
        "stat-available-memory": 400 * MIB,
    }
    assert usage(memory) == (180 * MIB, 80 * MIB)
    assert usage({}) == (700, 600)


@given(
    st.dictionaries(
        st.sampled_from(["stat-total-memory", "stat-free-memory", "stat-available-memory"]), st.integers(0, 1 << 64)
    )
)
def test_whatever_a_guest_says_of_its_memory_is_within_the_machine(memory: dict[str, int]) -> None:
    used, working = usage(memory)
    assert 0 <= working <= 512 * MIB
    assert 0 <= used <= 512 * MIB


def test_the_disks_file_counts_by_its_blocks(tmp_path: Path) -> None:
    root = tmp_path / "root.qcow2"
    with root.open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * 8192)
    found = machine_usage("c", 1, HostUsage(), {}, MIB, root)
    assert 8192 <= found.writable_bytes < 1 << 20
