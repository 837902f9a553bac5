"""Host pods: containers straight on the host, under the same agent."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.daemon import Daemon, container_config, sandbox_config
from tests.support.pods import out, sh, status, wait_exit
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

NODE, POD, CONTAINER = cri.NamespaceMode.NODE, cri.NamespaceMode.POD, cri.NamespaceMode.CONTAINER


def run_pod(daemon: Daemon, name: str, namespaces: Any, **security: Any) -> str:
    config = sandbox_config(name, daemon.base, hostname=f"{name}-host")
    config.linux.security_context.CopyFrom(cri.LinuxSandboxSecurityContext(namespace_options=namespaces, **security))
    return str(daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)


def start(daemon: Daemon, pod: str, image: str, name: str, script: str, namespaces: Any, **fields: Any) -> str:
    security = fields.pop("security", {})
    context = cri.LinuxContainerSecurityContext(namespace_options=namespaces, **security)
    linux = cri.LinuxContainerConfig(security_context=context, resources=fields.pop("resources", None))
    config = container_config(name, image, ["/bin/sh", "-c", script], linux=linux, **fields)
    sandbox = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config(sandbox.metadata.name, daemon.base)
    )
    container = str(daemon.runtime.CreateContainer(request).container_id)
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    return container


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


ALL = cri.NamespaceOption(network=NODE, pid=NODE, ipc=NODE)


@pytest.fixture(scope="module")
def pod(daemon: Daemon, busybox: str) -> Iterator[str]:
    """A pod in all of the host's namespaces, with its image's layers mounted, as they stay until its end."""
    name = run_pod(daemon, "node", ALL)
    image = daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox))).image_ref
    first = start(daemon, name, image, "first", "true", ALL)
    daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=first))
    yield name
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


def test_a_pod_in_the_hosts_namespaces(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    assert found.network.ip == ""
    assert found.linux.namespaces.options.network == NODE
    container = start(daemon, pod, image, "main", "echo out; echo err >&2; sleep 1000", ALL)
    assert out(daemon, container, "uname -r") == os.uname().release
    assert f" {os.getpid()} " in out(daemon, container, "ps | cat").replace("\n", " \n ")
    assert out(daemon, container, "cat /proc/net/route") == Path("/proc/net/route").read_text().strip()
    assert out(daemon, container, "hostname") == "node-host"
    log = daemon.base / "logs" / "node" / "main.log"
    assert until(lambda: log.read_text().count("\n") == 2)
    usage = daemon.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=container)).stats
    assert usage.memory.usage_bytes.value > 0
    stats = daemon.runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod)).stats
    assert stats.linux.process.process_count.value >= 2
    assert os.uname().nodename != "node-host"


def test_a_server_on_the_hosts_loopback(daemon: Daemon, image: str, pod: str) -> None:
    script = "mkdir -p /w; echo hello > /w/index.html; busybox httpd -f -p 127.0.0.1:18080 -h /w"
    start(daemon, pod, image, "web", script.replace("mkdir", "busybox mkdir"), ALL)

    def answers() -> bool:
        try:
            return bool(urllib.request.urlopen("http://127.0.0.1:18080/", timeout=2).read() == b"hello\n")
        except OSError:
            return False

    assert until(answers)


def test_mounts_and_devices_are_the_hosts(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for arguments in (["-t", "tmpfs", "tmpfs"], ["--make-private"], ["--make-shared"]):
        subprocess.run(["mount", *arguments, str(shared)], check=True)
    try:
        (shared / "both").mkdir()
        (shared / "later").mkdir()
        mounts = [
            cri.Mount(
                container_path="/v",
                host_path=str(shared),
                propagation=cri.MountPropagation.PROPAGATION_BIDIRECTIONAL,
            ),
            cri.Mount(container_path="/ro", host_path=str(shared), readonly=True, recursive_read_only=True),
        ]
        devices = [cri.Device(container_path="/dev/nothing", host_path="/dev/null", permissions="rw")]
        container = start(
            daemon,
            pod,
            image,
            "mounts",
            "sleep 1000",
            ALL,
            mounts=mounts,
            devices=devices,
            security={"privileged": False, "capabilities": cri.Capability(add_capabilities=["SYS_ADMIN"])},
        )
        out(daemon, container, "echo x > /dev/nothing; busybox mount -t tmpfs tmpfs /v/both && echo y > /v/both/y")
        assert (shared / "both" / "y").read_text() == "y\n"
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(shared / "later")], check=True)
        (shared / "later" / "z").write_text("z")
        assert out(daemon, container, "cat /v/later/z") == "z"
        assert sh(daemon, container, "echo x > /ro/x").exit_code != 0
        daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))
    finally:
        subprocess.run(["umount", "-R", "-l", str(shared)], check=True)


def test_exit_codes_limits_and_oom(daemon: Daemon, image: str, pod: str) -> None:
    failed = start(daemon, pod, image, "seven", "exit 7", ALL)
    assert wait_exit(daemon, failed).exit_code == 7
    limits = cri.LinuxContainerResources(memory_limit_in_bytes=16 * 1024 * 1024)
    hungry = start(daemon, pod, image, "hungry", "head -c 64000000 /dev/zero | tail", ALL, resources=limits)
    end = wait_exit(daemon, hungry)
    assert (end.reason, end.exit_code) == ("OOMKilled", 137)
    stopped = start(daemon, pod, image, "stopped", "sleep 1000", ALL)
    daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=stopped, timeout=1))
    assert status(daemon, stopped).state == cri.CONTAINER_EXITED


def test_a_pod_with_a_network_of_its_own_survives_the_daemon(daemon: Daemon, image: str) -> None:
    own = cri.NamespaceOption(pid=NODE)
    pod = run_pod(daemon, "own", own)
    address = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.network.ip
    subprocess.run(["busybox", "ping", "-c", "1", "-W", "3", address], check=True, capture_output=True)
    container = start(daemon, pod, image, "main", "i=0; while true; do echo $i; i=$((i+1)); sleep 0.05; done", own)
    daemon.stop(signal.SIGKILL)
    time.sleep(0.5)
    daemon.start()
    assert status(daemon, container).state == cri.CONTAINER_RUNNING
    assert out(daemon, container, "echo still here") == "still here"
    log = daemon.base / "logs" / "own" / "main.log"
    assert until(lambda: len(log.read_text().splitlines()) > 30)
    lines = [int(line.split(" ", 3)[3]) for line in log.read_text().splitlines()]
    assert lines == list(range(len(lines)))
    (agent,) = (
        int(line)
        for line in subprocess.run(
            ["pgrep", "-f", f"vmruntime-agent --listen unix:{daemon.run}/sandboxes/{pod[:13]}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
    )
    os.kill(agent, signal.SIGKILL)
    assert until(lambda: bool(status(daemon, container).state == cri.CONTAINER_EXITED))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


def test_what_cannot_be_is_refused(daemon: Daemon, image: str) -> None:
    config = sandbox_config("vm", daemon.base, annotations={"vmruntime.io/kind": "container"})
    config.linux.security_context.namespace_options.network = NODE
    with pytest.raises(grpc.RpcError) as caught:
        daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "network: NODE" in str(caught.value.details())
    config = sandbox_config("sysctl", daemon.base)
    config.linux.security_context.namespace_options.network = NODE
    config.linux.sysctls["net.ipv4.ip_forward"] = "1"
    with pytest.raises(grpc.RpcError) as caught:
        daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config))
    assert "without changing the host" in str(caught.value.details())
