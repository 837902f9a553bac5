"""Limits, their changes, and what pods use, with real guests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.daemon import Daemon, sandbox_config
from tests.support.pods import create, out, start, status
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

MIB = 1024 * 1024
NAMESPACES = cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.NamespaceMode.CONTAINER))


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Iterator[str]:
    """A pod that came with resources, as kubelet's do: a VM of 1 CPU and 128 + 96 MiB."""
    config = sandbox_config("resources", daemon.base)
    config.linux.resources.CopyFrom(
        cri.LinuxContainerResources(cpu_quota=100_000, cpu_period=100_000, memory_limit_in_bytes=128 * MIB)
    )
    name = daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    yield str(name)
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


def linux(**resources: Any) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(**resources), security_context=NAMESPACES)


def memory_mib(daemon: Daemon, container: str) -> int:
    return int(out(daemon, container, "cat /proc/meminfo").split()[1]) // 1024


def test_what_kubelet_sends_becomes_the_containers_limits(daemon: Daemon, image: str, pod: str) -> None:
    config = linux(
        cpu_period=100_000,
        cpu_quota=50_000,
        cpu_shares=512,
        memory_limit_in_bytes=64 * MIB,
        memory_swap_limit_in_bytes=64 * MIB,
        oom_score_adj=999,
        cpuset_cpus="3",
        hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=0), cri.HugepageLimit(page_size="1GB", limit=0)],
        unified={"memory.oom.group": "1", "pids.max": "77"},
    )
    container = start(daemon, pod, image, "kubelet", "sleep 1000", linux=config)
    cgroup = "cd /sys/fs/cgroup && "
    assert (
        out(daemon, container, cgroup + "cat cpu.max memory.max memory.oom.group pids.max")
        == "50000 100000\n67108864\n1\n77"
    )
    assert out(daemon, container, "cat /proc/1/oom_score_adj") == "999"

    daemon.runtime.UpdateContainerResources(
        cri.UpdateContainerResourcesRequest(
            container_id=container,
            linux=cri.LinuxContainerResources(cpu_quota=80_000, memory_limit_in_bytes=96 * MIB),
        )
    )
    assert (
        out(daemon, container, cgroup + "cat cpu.max memory.max memory.oom.group pids.max")
        == "80000 100000\n100663296\n1\n77"
    )
    found = status(daemon, container).resources.linux
    assert (found.cpu_quota, found.cpu_shares, found.memory_limit_in_bytes) == (80_000, 512, 96 * MIB)

    with pytest.raises(grpc.RpcError) as caught:
        create(
            daemon,
            pod,
            image,
            "huge",
            "true",
            linux=linux(hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=2 * MIB)]),
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "hugepage" in str(caught.value.details())


def test_the_vm_grows(daemon: Daemon, image: str, pod: str) -> None:
    container = start(daemon, pod, image, "grow", "sleep 1000", linux=linux())
    before = memory_mib(daemon, container)
    assert before < 224
    assert out(daemon, container, "cat /sys/devices/system/cpu/online") == "0"
    daemon.runtime.UpdatePodSandboxResources(
        cri.UpdatePodSandboxResourcesRequest(
            pod_sandbox_id=pod,
            resources=cri.LinuxContainerResources(
                cpu_quota=200_000, cpu_period=100_000, memory_limit_in_bytes=384 * MIB
            ),
        )
    )
    assert out(daemon, container, "cat /sys/devices/system/cpu/online") == "0-1"
    deadline = time.monotonic() + 10
    while memory_mib(daemon, container) < before + 240 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert memory_mib(daemon, container) >= before + 240
    # A container that does not fit makes room for itself.
    big = start(daemon, pod, image, "big", "sleep 1000", linux=linux(memory_limit_in_bytes=768 * MIB))
    deadline = time.monotonic() + 10
    while memory_mib(daemon, big) < 768 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert memory_mib(daemon, big) >= 768
    with pytest.raises(grpc.RpcError) as caught:
        daemon.runtime.UpdateContainerResources(
            cri.UpdateContainerResourcesRequest(
                container_id=big, linux=cri.LinuxContainerResources(memory_limit_in_bytes=2**50)
            )
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "this host" in str(caught.value.details())
    assert status(daemon, big).resources.linux.memory_limit_in_bytes == 768 * MIB


def test_an_exited_container_keeps_its_limits(daemon: Daemon, image: str, pod: str) -> None:
    container = start(daemon, pod, image, "gone", "true", linux=linux())
    deadline = time.monotonic() + 10
    while status(daemon, container).state != cri.CONTAINER_EXITED and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.runtime.UpdateContainerResources(cri.UpdateContainerResourcesRequest(container_id=container))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_pods_cgroup_without_room_for_its_vm(daemon: Daemon, image: str) -> None:
    """kubelet's limit is the containers' alone when no RuntimeClass declares an overhead."""
    hierarchy = Path("/sys/fs/cgroup/memory")
    hierarchy = hierarchy if hierarchy.is_dir() else Path("/sys/fs/cgroup")
    parent = hierarchy / f"small-{os.getpid()}"
    parent.mkdir()
    try:
        limit = parent / ("memory.max" if (parent / "memory.max").exists() else "memory.limit_in_bytes")
        limit.write_text(str(64 * MIB))
        config = sandbox_config("small", daemon.base)
        config.linux.cgroup_parent = f"/{parent.name}"
        config.linux.resources.memory_limit_in_bytes = 64 * MIB
        pod = daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
        container = start(daemon, pod, image, "main", "sleep 1000", linux=linux(memory_limit_in_bytes=64 * MIB))
        assert out(daemon, container, "cat /sys/fs/cgroup/memory.max") == str(64 * MIB)
        daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    finally:
        parent.rmdir()


def test_statistics_and_metrics_of_pods(daemon: Daemon, image: str, pod: str) -> None:
    container = start(daemon, pod, image, "busy", "while true; do true; done", linux=linux())
    time.sleep(0.5)
    found = daemon.runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod)).stats
    assert found.attributes.metadata.name == "resources"
    assert found.linux.cpu.usage_core_nano_seconds.value > 0
    assert found.linux.memory.usage_bytes.value > 16 * MIB
    assert found.linux.network.default_interface.name == "eth0"
    assert found.linux.process.process_count.value >= 2
    one = next(one for one in found.linux.containers if one.attributes.id == container)
    assert one.cpu.usage_core_nano_seconds.value > 0
    listed = daemon.runtime.ListPodSandboxStats(cri.ListPodSandboxStatsRequest()).stats
    assert [one.attributes.id for one in listed] == [pod]

    keys = {
        one.name: list(one.label_keys)
        for one in daemon.runtime.ListMetricDescriptors(cri.ListMetricDescriptorsRequest()).descriptors
    }
    (metrics,) = daemon.runtime.ListPodSandboxMetrics(cri.ListPodSandboxMetricsRequest()).pod_metrics
    everything = [*metrics.metrics, *(one for group in metrics.container_metrics for one in group.metrics)]
    assert all(len(one.label_values) == len(keys[one.name]) for one in everything)
    assert {one.name for one in everything} == set(keys)
    value = {one.name: one.value.value for one in metrics.container_metrics[-1].metrics}
    assert value["container_processes"] == value["container_threads"] == 1
    assert value["container_file_descriptors"] >= 3
    assert value["container_memory_max_usage_bytes"] >= value["container_memory_rss"] > 0
    assert value["container_fs_inodes_total"] > value["container_fs_inodes_free"] > 0
    cpu = [one for one in everything if one.name == "container_cpu_usage_seconds_total"]
    labels = [dict(zip(keys[one.name], one.label_values, strict=True)) for one in cpu]
    assert {"pod": "resources", "namespace": "test", "container": "busy"}.items() <= labels[-1].items()
    info = json.loads(
        daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)).info["info"]
    )
    assert info["phases_ms"]["total"] > 0
