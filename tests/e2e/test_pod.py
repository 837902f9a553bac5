"""A container pod through the CRI socket, with a plain gRPC client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from tests.support.daemon import Daemon, container_config, running_daemon, sandbox_config
from tests.support.pods import ask, create, run_pod, sh, start, status, wait_exit
from tests.support.refusal import refused
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) [FP] ")


def test_a_pod_has_its_own_kernel_network_and_log(daemon: Daemon, image: str) -> None:
    pod = run_pod(daemon, "life", hostname="my-host", dns_config=cri.DNSConfig(servers=["192.0.2.53"]))
    container = start(daemon, pod, image, "main", "hostname; uname -r; cat /etc/resolv.conf; echo bad >&2; sleep 1000")
    found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
    assert found.status.state == cri.SANDBOX_READY
    address = found.status.network.ip
    subprocess.run(["busybox", "ping", "-c", "1", "-W", "3", address], check=True, capture_output=True)
    time.sleep(0.5)
    log = (daemon.base / "logs" / "life" / "main.log").read_text()
    assert all(LINE.match(line) for line in log.splitlines())
    text = [line.split(" ", 3)[3] for line in log.splitlines()]
    assert text[0] == "my-host"
    assert text[1] != os.uname().release
    assert "nameserver 192.0.2.53" in text
    assert " stderr F bad" in log

    done = sh(daemon, container, "echo out; echo err >&2; exit 4")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 4)
    with pytest.raises(grpc.RpcError) as late:
        sh(daemon, container, "sleep 30", timeout=1)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    usage = daemon.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=container)).stats
    assert usage.cpu.usage_core_nano_seconds.value > 0
    assert usage.memory.working_set_bytes.value > 0

    daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=1))
    daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=1))
    assert status(daemon, container).exit_code in (137, 143)
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod))
    assert found.status.state == cri.SANDBOX_NOTREADY


def test_two_pods_and_two_containers_reach_each_other(daemon: Daemon, image: str) -> None:
    server = run_pod(daemon, "server")
    start(daemon, server, image, "web", "while true; do echo answer | nc -l -p 7000; done")
    neighbour = start(daemon, server, image, "side", "sleep 1000")
    client = run_pod(daemon, "client")
    caller = start(daemon, client, image, "call", "sleep 1000")
    address = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=server)).status.network.ip
    assert ask(daemon, neighbour, "127.0.0.1") == b"answer\n"
    assert ask(daemon, caller, address) == b"answer\n"


def test_exit_codes_oom_and_missing_commands(daemon: Daemon, image: str) -> None:
    pod = run_pod(daemon, "ends")
    good = wait_exit(daemon, start(daemon, pod, image, "good", "true"))
    assert (good.exit_code, good.reason) == (0, "Completed")
    bad = wait_exit(daemon, start(daemon, pod, image, "bad", "exit 9"))
    assert (bad.exit_code, bad.reason) == (9, "Error")
    limits = cri.LinuxContainerConfig(
        resources=cri.LinuxContainerResources(memory_limit_in_bytes=16 << 20),
        security_context=cri.LinuxContainerSecurityContext(
            namespace_options=cri.NamespaceOption(pid=cri.NamespaceMode.CONTAINER)
        ),
    )
    hog = wait_exit(daemon, start(daemon, pod, image, "hog", "x=$(yes | head -c 200000000)", linux=limits))
    assert hog.reason == "OOMKilled"

    config = container_config("typo", image, ["/bin/no-such"])
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config("ends", daemon.base)
    )
    typo = daemon.runtime.CreateContainer(request).container_id
    with pytest.raises(grpc.RpcError) as refused:
        daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=typo))
    assert "/bin/no-such" in str(refused.value.details())
    assert status(daemon, typo).exit_code == 127


def test_names_ids_and_states_are_checked(daemon: Daemon, image: str) -> None:
    pod = run_pod(daemon, "names")
    with pytest.raises(grpc.RpcError) as taken:
        run_pod(daemon, "names")
    assert taken.value.code() is grpc.StatusCode.ALREADY_EXISTS
    container = start(daemon, pod, image, "one", "sleep 1000")
    with pytest.raises(grpc.RpcError) as taken:
        create(daemon, pod, image, "one", "true")
    assert taken.value.code() is grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(grpc.RpcError) as again:
        daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    assert again.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.RpcError) as unknown:
        status(daemon, "no-such-id")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as absent:
        create(daemon, pod, "example.invalid/none:1", "two", "true")
    assert absent.value.code() is grpc.StatusCode.NOT_FOUND
    daemon.runtime.StopContainer(cri.StopContainerRequest(container_id="no-such-id"))
    daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id="no-such-id"))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id="no-such-id"))


def test_log_rotation_loses_nothing(daemon: Daemon, image: str) -> None:
    pod = run_pod(daemon, "rotate")
    script = "i=0; while [ $i -lt 300 ]; do echo n-$i; i=$((i+1)); sleep 0.01; done"
    container = start(daemon, pod, image, "main", script)
    path = daemon.base / "logs" / "rotate" / "main.log"
    for number in range(3):
        time.sleep(0.5)
        path.rename(path.with_name(f"main.log.{number}"))
        daemon.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=container))
    wait_exit(daemon, container)
    files = [*sorted(path.parent.glob("main.log.*")), path]
    lines = [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]
    assert lines == [f"n-{n}" for n in range(300)]


def test_killed_daemon_loses_nothing(daemon: Daemon, image: str) -> None:
    """SIGKILL while a container writes: it goes on, its log has every line once, what died is reported."""
    pod, doomed = run_pod(daemon, "keeps"), run_pod(daemon, "dies")
    script = "i=0; while [ $i -lt 600 ]; do echo n-$i; i=$((i+1)); sleep 0.01; done; sleep 1000"
    container = start(daemon, pod, image, "main", script)
    victim = start(daemon, doomed, image, "main", "sleep 1000")
    short = start(daemon, pod, image, "short", "sleep 2; exit 6")
    for _ in range(2):
        time.sleep(1)
        daemon.stop(signal.SIGKILL)
        if _ == 0:
            kill_qemu(doomed)
        time.sleep(1)
        daemon.start()
    found = {one.id: one.state for one in daemon.runtime.ListContainers(cri.ListContainersRequest()).containers}
    assert found[container] == cri.CONTAINER_RUNNING
    assert found[victim] == cri.CONTAINER_EXITED
    assert "VM ended" in status(daemon, victim).message
    assert wait_exit(daemon, short).exit_code == 6
    states = {one.id: one.state for one in daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items}
    assert states == {pod: cri.SANDBOX_READY, doomed: cri.SANDBOX_NOTREADY}
    path = daemon.base / "logs" / "keeps" / "main.log"
    deadline = time.monotonic() + 30
    while "n-599" not in path.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    lines = [line.split(" ", 3)[3] for line in path.read_text().splitlines()]
    assert lines == [f"n-{n}" for n in range(600)]
    assert sh(daemon, container, "echo here").stdout == b"here\n"


def test_a_vm_that_dies_is_reported(daemon: Daemon, image: str) -> None:
    pod = run_pod(daemon, "crash")
    container = start(daemon, pod, image, "main", "sleep 1000")
    kill_qemu(pod)
    assert "VM ended" in wait_exit(daemon, container).message
    found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    assert found.state == cri.SANDBOX_NOTREADY


def test_a_failing_cni_plugin_leaves_nothing(base: Path) -> None:
    """The network fails while the VM boots: the call fails with the plugin's words, and everything is undone."""
    bin_dir, conf_dir = base / "bin", base / "broken.d"
    bin_dir.mkdir()
    conf_dir.mkdir()
    plugin = bin_dir / "broken"
    plugin.write_text('#!/bin/sh\nsleep 0.3\necho \'{"code": 100, "msg": "no addresses left"}\'\nexit 1\n')
    plugin.chmod(0o755)
    (conf_dir / "1.conflist").write_text('{"cniVersion": "1.0.0", "name": "x", "plugins": [{"type": "broken"}]}')
    extra = f'[network]\nconf_dir = "{conf_dir}"\nbin_dirs = ["{bin_dir}"]'
    with running_daemon(base / "broken", extra) as daemon:
        with pytest.raises(grpc.RpcError) as failed:
            run_pod(daemon, "nonet")
        assert "no addresses left" in str(failed.value.details())
        plugin.write_text(
            "#!/bin/sh\nexit 0\n"
        )  # what could not be deleted stays written down; the next start tries again
        daemon.stop()
        daemon.start()


def kill_qemu(pod: str) -> None:
    """Kill the QEMU of one pod: ours, by pid, found by the name the daemon gave it."""
    marker = f"guest=vmruntime-{pod[:13]}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if marker in line and line.startswith(b"/usr/bin/qemu"):
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no QEMU for {pod}")


def test_checkpoints_are_refused_and_cost_nothing(daemon: Daemon, image: str, tmp_path: Path) -> None:
    pod = run_pod(daemon, "forensics")
    container = start(daemon, pod, image, "main", "sleep 1000")
    path = str(tmp_path / "checkpoint")
    with refused(grpc.StatusCode.UNIMPLEMENTED, f"container_id: '{container}'", "CRIU", "in a volume"):
        daemon.runtime.CheckpointContainer(cri.CheckpointContainerRequest(container_id=container, location=path))
    with refused(grpc.StatusCode.UNIMPLEMENTED, f"pod_sandbox_id: '{pod}'", "virtio-fs"):
        daemon.runtime.CheckpointPod(cri.CheckpointPodRequest(pod_sandbox_id=pod, output_path=path))
    with refused(grpc.StatusCode.UNIMPLEMENTED, "checkpoint_path", path):
        daemon.runtime.RestorePod(cri.RestorePodRequest(checkpoint_path=path))
    assert list(tmp_path.iterdir()) == []
    assert sh(daemon, container, "echo here").stdout == b"here\n"
