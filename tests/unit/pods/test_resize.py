"""Limits after a change, and as a guest can hold them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmruntime.errors import InvalidArgument
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import SandboxKind
from vmruntime.pods.oci.resources import guest_resources, hugetlb_controlled
from vmruntime.pods.resize import merge
from vmruntime.sandboxes.cgroup import HostCgroups, read_usage


def test_what_is_left_out_stays() -> None:
    old = LinuxResources(cpu_shares=2, cpu_quota=1000, memory_limit=100, memory_swap_limit=150, unified={"a.b": "1"})
    new = merge(old, LinuxResources(cpu_quota=-1, memory_limit=300, unified={"c.d": "2"}))
    assert (new.cpu_shares, new.cpu_quota, new.memory_limit, new.memory_swap_limit) == (2, -1, 300, 350)
    assert new.unified == {"a.b": "1", "c.d": "2"}
    assert merge(old, LinuxResources()) == old


def test_the_hosts_processors_mean_nothing_in_a_vm() -> None:
    given = LinuxResources(cpuset_cpus="7", cpuset_mems="1", hugepage_limits={"2MB": 0}, memory_limit=1)
    assert guest_resources(given, SandboxKind.CONTAINER) == LinuxResources(memory_limit=1)
    on_host = guest_resources(given, SandboxKind.HOST)
    assert on_host.cpuset_cpus == "7"
    assert on_host.hugepage_limits == (given.hugepage_limits if hugetlb_controlled() else {})
    with pytest.raises(InvalidArgument, match="2MB: 4"):
        guest_resources(LinuxResources(hugepage_limits={"2MB": 4}), SandboxKind.CONTAINER)


def test_usage_of_both_versions_of_cgroups(tmp_path: Path) -> None:
    for name in ("v2", "memory", "cpuacct"):
        (tmp_path / name).mkdir()
    files = {
        "v2/cpu.stat": "usage_usec 5\n",
        "v2/memory.current": "1000\n",
        "v2/memory.stat": "anon 300\ninactive_file 400\npgfault 7\n",
        "v2/cgroup.procs": "1\n2\n",
        "memory/memory.usage_in_bytes": "2000\n",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\ntotal_rss 600\ntotal_pgfault 8\n",
        "cpuacct/cpuacct.usage": "9\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    v2 = read_usage([tmp_path / "v2"])
    assert (v2.cpu_ns, v2.memory_usage, v2.memory_working_set, v2.memory_rss, v2.processes) == (5000, 1000, 600, 300, 2)
    v1 = read_usage([tmp_path / "cpuacct", tmp_path / "memory"])
    assert (v1.cpu_ns, v1.memory_usage, v1.memory_working_set, v1.memory_rss, v1.page_faults) == (9, 2000, 1500, 600, 8)
    assert read_usage([tmp_path / "none"]).memory_usage == 0


async def test_the_lowest_limit_above_a_cgroup_counts(tmp_path: Path) -> None:
    (tmp_path / "kubepods" / "pod").mkdir(parents=True)
    cgroups = HostCgroups([tmp_path])
    assert await cgroups.memory_limit("kubepods/pod/vm") is None
    (tmp_path / "kubepods" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert await cgroups.memory_limit("kubepods/pod/vm") is None
    (tmp_path / "kubepods" / "memory.max").write_text("500\n")
    (tmp_path / "kubepods" / "pod" / "memory.max").write_text("max\n")
    assert await cgroups.memory_limit("kubepods/pod/vm") == 500
