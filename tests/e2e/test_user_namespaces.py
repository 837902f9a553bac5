"""Pods with a user namespace (hostUsers: false), in VMs and on the host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.daemon import Daemon, container_config, sandbox_config
from tests.support.pods import out, sh, status, wait_exit
from tests.support.refusal import refused
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

FIRST, COUNT = 300_000, 65_536
GROUPS = 500_000
"""Other than the users', so that a mix-up shows."""

UIDS = cri.IDMapping(container_id=0, host_id=FIRST, length=COUNT)
GIDS = cri.IDMapping(container_id=0, host_id=GROUPS, length=COUNT)
USER = cri.UserNamespace(mode=cri.POD, uids=[UIDS], gids=[GIDS])
SYSCTLS = {
    "net.ipv4.ping_group_range": "0 65535",
    "net.ipv4.ip_unprivileged_port_start": "1024",
    "kernel.shm_rmid_forced": "1",
}


def run_pod(daemon: Daemon, name: str, **fields: Any) -> str:
    config = sandbox_config(name, daemon.base, hostname=f"{name}-host", **fields)
    config.linux.security_context.namespace_options.CopyFrom(cri.NamespaceOption(userns_options=USER))
    config.linux.security_context.privileged = True
    config.linux.sysctls.update(SYSCTLS)
    return str(daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)


def create(daemon: Daemon, pod: str, image: str, name: str, script: str, **fields: Any) -> str:
    options = cri.NamespaceOption(pid=fields.pop("pid", cri.CONTAINER), userns_options=fields.pop("user", USER))
    security = cri.LinuxContainerSecurityContext(namespace_options=options, **fields.pop("security", {}))
    linux = cri.LinuxContainerConfig(security_context=security, resources=fields.pop("resources", None))
    config = container_config(name, image, ["/bin/sh", "-c", script], linux=linux, **fields)
    sandbox = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config(sandbox.metadata.name, daemon.base)
    )
    return str(daemon.runtime.CreateContainer(request).container_id)


def start(daemon: Daemon, pod: str, image: str, name: str, script: str = "sleep 1000", **fields: Any) -> str:
    container = create(daemon, pod, image, name, script, **fields)
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    return container


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def fetched(url: str) -> bytes:
    try:
        return bytes(urllib.request.urlopen(url, timeout=20).read())
    except OSError:
        return b""


def mapped(path: str, host_path: Path, **fields: Any) -> Any:
    return cri.Mount(container_path=path, host_path=str(host_path), uidMappings=[UIDS], gidMappings=[GIDS], **fields)


@pytest.fixture(scope="module", params=["container", "host"])
def pod(request: pytest.FixtureRequest, daemon: Daemon, busybox: str) -> Iterator[str]:
    """A pod of each kind."""
    kind = str(request.param)
    name = run_pod(daemon, f"users-{kind}", annotations={"vmruntime.io/kind": kind})
    image = daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox))).image_ref
    # Host pods keep their layers until the pod ends; so that each test finds the pod as it left it, they come first.
    first = start(daemon, name, image, "first", "true")
    daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=first))
    yield name
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


def in_vm(daemon: Daemon, pod: str) -> bool:
    found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    return str(found.annotations["vmruntime.io/kind"]) == "container"


def test_ids_files_and_kernel_file_systems(daemon: Daemon, image: str, pod: str) -> None:
    # Not everybody's host lets root go below 0.
    score = -997 if in_vm(daemon, pod) else 997
    container = start(daemon, pod, image, "main", resources=cri.LinuxContainerResources(oom_score_adj=score))
    ids = out(daemon, container, "cat /proc/self/uid_map /proc/self/gid_map").split()
    assert ids == ["0", str(FIRST), str(COUNT), "0", str(GROUPS), str(COUNT)]
    assert out(daemon, container, "id -u; id -g") == "0\n0"
    assert out(daemon, container, "stat -c '%u %g' / /bin/busybox /etc/resolv.conf") == "0 0\n0 0\n0 0"
    out(daemon, container, "echo new > /etc/new && chmod 600 /etc/new && chown 1001:1002 /etc/new")
    assert out(daemon, container, "stat -c '%u %g %a' /etc/new") == "1001 1002 600"
    out(daemon, container, "echo changed >> /etc/passwd && mkdir -p /dev/shm/d /dev/mqueue && ls /dev/pts/ptmx")
    out(daemon, container, "echo x > /dev/null && head -c 4 /dev/urandom > /dev/shm/d/r && test -d /sys/class/net/eth0")
    assert out(daemon, container, "cat /proc/self/oom_score_adj") == str(score)
    assert out(daemon, container, "hostname").endswith("-host")
    # Nothing is masked when no paths are given, and yet what is not the pod's stays out of reach.
    assert b"Permission denied" in sh(daemon, container, "echo 1 > /proc/sys/kernel/panic").stderr
    usage = daemon.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=container)).stats
    assert usage.memory.usage_bytes.value > 0
    assert usage.writable_layer.used_bytes.value > 0
    found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    assert found.linux.namespaces.options.userns_options == USER


def test_users_groups_and_output(daemon: Daemon, image: str, pod: str) -> None:
    security = {"run_as_username": "web", "supplemental_groups": [4242], "no_new_privs": True}
    script = "id -u; id -G; echo again > /dev/stdout; echo problem > /dev/stderr"
    container = start(daemon, pod, image, "web", f"{script}; sleep 1000", security=security)
    assert out(daemon, container, script) == "1001\n1002 4242\nagain"
    assert status(daemon, container).user.linux.uid == 1001
    daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
    wait_exit(daemon, container)
    name = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.metadata.name
    log = daemon.base / "logs" / name / "web.log"
    assert until(lambda: len(log.read_text().splitlines()) == 4)
    lines = log.read_text().splitlines()
    assert sorted(line.split(" ", 1)[1] for line in lines) == [
        "stderr F problem",
        "stdout F 1001",
        "stdout F 1002 4242",
        "stdout F again",
    ]
    readonly = start(daemon, pod, image, "readonly", security={"readonly_rootfs": True})
    assert b"Read-only" in sh(daemon, readonly, "echo x > /etc/x").stderr


def test_the_network_is_the_pods(daemon: Daemon, image: str, pod: str) -> None:
    web = start(
        daemon, pod, image, "http", "mkdir -p /w; echo hello > /w/index.html; exec busybox httpd -f -p 80 -h /w"
    )
    found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.network.ip
    assert until(lambda: b"hello" in sh(daemon, web, "echo 'GET / HTTP/1.0' | nc 127.0.0.1 80").stdout)
    assert urllib.request.urlopen(f"http://{found}/", timeout=20).read() == b"hello\n"
    assert out(daemon, web, "cat /proc/sys/net/ipv4/ping_group_range").split() == ["0", "65535"]
    assert out(daemon, web, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start") == "1024"
    out(daemon, web, "busybox ping -c 1 -W 5 127.0.0.1")
    admin = start(
        daemon, pod, image, "admin", security={"capabilities": cri.Capability(add_capabilities=["NET_ADMIN"])}
    )
    out(daemon, admin, "busybox ip link add dummy0 type dummy || busybox ip address add 192.0.2.1/32 dev lo")
    stats = daemon.runtime.PodSandboxStats(cri.PodSandboxStatsRequest(pod_sandbox_id=pod)).stats
    if in_vm(daemon, pod):
        assert stats.linux.network.default_interface.rx_bytes.value > 0


def test_a_terminal_belongs_to_the_containers_user(daemon: Daemon, image: str, pod: str) -> None:
    script = "stat -c '%u' $(readlink /proc/self/fd/0); echo typed > /dev/tty; sleep 1000"
    start(daemon, pod, image, "terminal", script.replace("readlink", "busybox readlink"), tty=True,
          security={"run_as_username": "web"})  # fmt: skip
    name = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.metadata.name
    log = daemon.base / "logs" / name / "terminal.log"
    assert until(lambda: len(log.read_text().splitlines()) == 2), log.read_text()
    assert [line.split(" ", 3)[3] for line in log.read_text().splitlines()] == ["1001", "typed"]


def test_block_devices(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"content" + bytes(1 << 20))
    attach = ["losetup", "-f", "--show", str(tmp_path / "disk")]
    loop = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        device = cri.Device(container_path="/dev/block", host_path=loop, permissions="rw")
        container = start(daemon, pod, image, "disk", devices=[device])
        if in_vm(daemon, pod):
            assert out(daemon, container, "head -c 7 /dev/block; stat -c ' %u %g' /dev/block") == "content 0 0"
        else:  # the host's node, whose owner it keeps
            assert b"Permission denied" in sh(daemon, container, "head -c 7 /dev/block").stderr
        daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


def test_privileged_in_the_namespace_alone(daemon: Daemon, image: str, pod: str) -> None:
    container = start(daemon, pod, image, "privileged", security={"privileged": True})
    out(daemon, container, "mkdir /m && busybox mount -t tmpfs tmpfs /m && busybox ip link set lo mtu 60000")
    assert b"Permission denied" in sh(daemon, container, "echo 1 > /proc/sys/kernel/panic").stderr
    disk = "/dev/sda" if in_vm(daemon, pod) else "/dev/kmsg"
    assert sh(daemon, container, f"head -c 1 {disk}").exit_code != 0


def test_ports_are_forwarded_into_the_pods_network(daemon: Daemon, image: str, pod: str) -> None:
    page = "mkdir -p /w; echo page > /w/index.html; exec busybox httpd -f -p 127.0.0.1:8081 -h /w"
    start(daemon, pod, image, "loopback", page)
    command = [sys.executable, "-m", "vmruntime.cli.main", "--config", str(daemon.config), "port-forward", pod, ":8081"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split(b" ")[0].split(b":")[1])
            assert until(lambda: fetched(f"http://127.0.0.1:{port}/") == b"page\n")
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            process.kill()


def test_a_restarted_daemon_goes_on(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text\n")
    container = start(daemon, pod, image, "stays", mounts=[mapped("/v", tmp_path)])
    daemon.stop(signal.SIGKILL)
    daemon.start()
    assert out(daemon, container, "stat -c '%u %g' /v/file; cat /v/file") == "0 0\ntext"
    later = start(daemon, pod, image, "later", mounts=[mapped("/v", tmp_path)], pid=cri.POD)
    assert out(daemon, later, "cat /proc/self/uid_map; stat -c '%u %g' /v/file").split() == [
        "0", str(FIRST), str(COUNT), "0", "0",
    ]  # fmt: skip
    for one in (container, later):
        daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=one))


def test_containers_share_what_the_pod_has(daemon: Daemon, image: str, pod: str) -> None:
    one = start(daemon, pod, image, "one", pid=cri.POD)
    two = start(daemon, pod, image, "two", "exec sleep 4321", pid=cri.POD)
    out(daemon, one, "echo shared > /dev/shm/file")
    assert out(daemon, two, "cat /dev/shm/file; busybox rm /dev/shm/file") == "shared"
    assert "sleep 4321" in out(daemon, one, "ps")
    assert out(daemon, one, "cat /proc/sys/kernel/shm_rmid_forced") == "1"


def test_volumes_keep_their_ids_on_the_host(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    data, plain = tmp_path / "data", tmp_path / "plain"
    for directory in (data, plain):
        directory.mkdir(mode=0o755)
        (directory / "old").write_text("old\n")
    os.chown(data / "old", 1001, 1002)
    (tmp_path / "one").write_text("one file\n")
    container = start(
        daemon,
        pod,
        image,
        "volumes",
        mounts=[
            mapped("/data", data),
            mapped("/data/ro", data, readonly=True),
            mapped("/one", tmp_path / "one"),
            cri.Mount(container_path="/plain", host_path=str(plain)),
        ],
    )
    assert out(daemon, container, "stat -c '%u %g' /data /data/old /one") == "0 0\n1001 1002\n0 0"
    out(daemon, container, "echo new > /data/new; echo web > /data/web; chown 1001:1002 /data/web; cat /one")
    owners = {name: (os.stat(data / name).st_uid, os.stat(data / name).st_gid) for name in ("new", "web")}
    assert owners == {"new": (0, 0), "web": (1001, 1002)}
    assert b"Read-only" in sh(daemon, container, "echo x > /data/ro/x").stderr
    assert out(daemon, container, "stat -c '%u %g' /plain; cat /plain/old") == "65534 65534\nold"
    assert b"Permission denied" in sh(daemon, container, "echo x > /plain/x").stderr
    assert list(status(daemon, container).mounts[0].uidMappings) == [UIDS]
    daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))
    assert container not in Path("/proc/self/mountinfo").read_text()


def test_an_empty_dir_in_memory_belongs_to_the_pods_groups(
    daemon: Daemon, image: str, pod: str, tmp_path: Path
) -> None:
    memory = tmp_path / "kubernetes.io~empty-dir" / "cache"
    memory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,gid=2000,mode=2775", "tmpfs", str(memory)], check=True)
    try:
        container = start(
            daemon,
            pod,
            image,
            "memory",
            mounts=[mapped("/cache", memory)],
            security={"run_as_username": "web", "supplemental_groups": [2000]},
        )
        assert out(daemon, container, "stat -c '%g %a' /cache; echo x > /cache/x; stat -c '%u %g' /cache/x") == (
            "2000 2775\n1001 2000"
        )
        daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))
    finally:
        subprocess.run(["umount", "-l", str(memory)], check=True)


def test_a_volumes_mount_options(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "script").chmod(0o755)
    container = start(
        daemon, pod, image, "options", mounts=[mapped("/v", tmp_path), mapped("/n", tmp_path, mount_options=["noexec"])]
    )
    assert out(daemon, container, "/v/script") == "ran"
    assert b"Permission denied" in sh(daemon, container, "/n/script").stderr


def test_image_volumes(daemon: Daemon, image: str, pod: str) -> None:
    mount = cri.Mount(
        container_path="/image", readonly=True, image=cri.ImageSpec(image=image), uidMappings=[UIDS], gidMappings=[GIDS]
    )
    container = start(daemon, pod, image, "images", mounts=[mount])
    assert out(daemon, container, "stat -c '%u %g' /image/etc/group") == "0 0"


def test_what_differs_from_the_pod_is_refused(daemon: Daemon, image: str, pod: str) -> None:
    other = cri.UserNamespace(mode=cri.POD, uids=[GIDS], gids=[GIDS])
    for user in (cri.UserNamespace(mode=cri.NODE), other):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "userns_options", str(FIRST)):
            create(daemon, pod, image, "other", "true", user=user)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "config.mounts[0].uidMappings", "type proc", "hostUsers"):
        create(daemon, pod, image, "proc", "true", mounts=[mapped("/p", Path("/proc/sys"))])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "run_as_user", "70000", "0 to 65535"):
        create(daemon, pod, image, "high", "true", security={"run_as_user": cri.Int64Value(value=70_000)})


def test_the_features_are_told(daemon: Daemon) -> None:
    handlers = daemon.runtime.Status(cri.StatusRequest()).runtime_handlers
    assert {one.name for one in handlers if one.features.user_namespaces} == {"", "container", "host"}
