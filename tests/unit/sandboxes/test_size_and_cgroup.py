"""How large a VM is, and where its processes go."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmruntime.config.settings import GuestSettings
from vmruntime.errors import InvalidArgument
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import SandboxMetadata, SandboxSpec
from vmruntime.sandboxes.cgroup import HostCgroups, cgroup_path
from vmruntime.sandboxes.size import vm_size

MIB = 1024 * 1024


def spec(resources: LinuxResources | None = None, overhead: LinuxResources | None = None) -> SandboxSpec:
    metadata = SandboxMetadata(name="p", uid="u", namespace="n")
    return SandboxSpec(metadata=metadata, resources=resources, overhead=overhead)


def test_a_pod_without_limits_gets_the_default() -> None:
    found = vm_size(spec(), GuestSettings(), 8192)
    assert (found.vcpus, found.memory_mib, found.max_memory_mib) == (1, 512, 8192)


def test_limits_plus_overhead() -> None:
    limits = LinuxResources(memory_limit=300 * MIB + 1, cpu_quota=150_000, cpu_period=100_000)
    found = vm_size(spec(limits), GuestSettings(), 8192)
    assert (found.vcpus, found.memory_mib) == (2, 301 + 96)
    # QEMU's own share of a declared overhead is not the guest's.
    declared = LinuxResources(memory_limit=160 * MIB)
    assert vm_size(spec(limits, declared), GuestSettings(), 8192).memory_mib == 301 + 160 - 64
    small = LinuxResources(memory_limit=50 * MIB)
    assert vm_size(spec(limits, small), GuestSettings(), 8192).memory_mib == 301 + 32


def test_more_than_the_host_has_is_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(InvalidArgument, match=r"memory_limit_in_bytes.*at most 904 MiB"):
        vm_size(spec(LinuxResources(memory_limit=4096 * MIB)), GuestSettings(), 1000)


@pytest.mark.parametrize(
    ("parent", "path"),
    [
        ("/vmruntime", "vmruntime/vmruntime-x"),
        ("/kubepods/burstable/pod1", "kubepods/burstable/pod1/vmruntime-x"),
        (
            "kubepods-burstable-pod1.slice",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/vmruntime-x",
        ),
    ],
)
def test_cgroup_paths(parent: str, path: str) -> None:
    assert cgroup_path(parent, "x") == path


def test_a_cgroup_parent_cannot_leave_the_hierarchy() -> None:
    with pytest.raises(InvalidArgument, match="cgroup_parent"):
        cgroup_path("/../etc", "x")


def test_both_cgroup_versions_are_found(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(
        "30 25 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
        "31 25 0:27 / /sys/fs/cgroup/cpuset rw shared:9 - cgroup cgroup rw,cpuset\n"
        "32 25 0:28 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
        "33 25 0:29 / /proc rw shared:9 - proc proc rw\n"
    )
    found = HostCgroups.detect(mountinfo)
    assert [str(path) for path in found._hierarchies] == ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified"]


async def test_cgroups_are_made_and_removed_with_the_default_parent(tmp_path: Path) -> None:
    cgroups = HostCgroups([tmp_path / "memory", tmp_path / "cpu"])
    await cgroups.create("vmruntime/vmruntime-x")
    assert (tmp_path / "cpu/vmruntime/vmruntime-x").is_dir()
    await cgroups.remove("vmruntime/vmruntime-x")
    await cgroups.remove("vmruntime/vmruntime-x")
    assert not (tmp_path / "memory/vmruntime").exists()
