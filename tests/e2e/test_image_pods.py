"""Image pods through the CRI socket: a small VM image, booted as it is, on whoever runs them by default."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.support import leaks, vm_images
from tests.support.daemon import Daemon, sandbox_config
from tests.support.image_pods import Machine, boot, create, image_daemon, pull, run_pod, ssh, ssh_key, start, wait_until
from tests.support.screen import argv, at_a_terminal
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

SMALL = "virtlet.cloud/small"


@pytest.fixture(scope="module")
def vms(base: Path) -> Iterator[Daemon]:
    """A daemon that knows the small image."""
    with image_daemon(base / "vms", {"small": vm_images.small().as_uri()}) as daemon:
        pull(daemon, SMALL)
        yield daemon


@pytest.fixture(scope="module")
def key(base: Path) -> tuple[Path, str]:
    """An SSH key: its file, and the public one."""
    (base / "ssh").mkdir()
    return ssh_key(base / "ssh")


@pytest.fixture(scope="module")
def volumes(base: Path) -> Path:
    """A directory as kubelet has a ConfigMap's, and one of an emptyDir."""
    root = base / "kubelet" / "pods" / "uid" / "volumes"
    config = root / "kubernetes.io~configmap" / "settings"
    (config / "..2026_1").mkdir(parents=True)
    (config / "..2026_1" / "level").write_text("one\n")
    (config / "..data").symlink_to("..2026_1")
    (config / "level").symlink_to("..data/level")
    (root / "kubernetes.io~empty-dir" / "scratch").mkdir(parents=True)
    return root


@pytest.fixture(scope="module")
def machine(vms: Daemon, key: tuple[Path, str], volumes: Path) -> Machine:
    """A machine for every test here that needs no other."""
    annotations = {
        "VirtletSSHKeys": key[1],
        "vmruntime.io/cloud-init-user-data": json.dumps(
            {"write_files": [{"path": "/etc/greeting", "content": "hello from user-data\n"}]}
        ),
    }
    mounts = [
        cri.Mount(
            container_path="/etc/settings",
            host_path=str(volumes / "kubernetes.io~configmap" / "settings"),
            readonly=True,
        ),
        cri.Mount(container_path="/scratch", host_path=str(volumes / "kubernetes.io~empty-dir" / "scratch")),
    ]
    found = boot(
        vms,
        "shared",
        SMALL,
        annotations,
        pod_fields={"hostname": "small-vm", "dns_config": cri.DNSConfig(servers=["192.0.2.53"])},
        envs=[cri.KeyValue(key="COLOUR", value=b"dark blue")],
        mounts=mounts,
        stdin=True,
        tty=True,
    )
    found.wait_agent()
    return found


@pytest.fixture(autouse=True)
def clean(vms: Daemon, machine: Machine) -> Iterator[None]:
    """The leak check, of a daemon that has run a machine already: what it then keeps open for all of them is no leak."""
    pods, containers = vms.pods(), vms.containers()
    with leaks.nothing_left(vms.footprint, lambda: vms.remove_all_but(pods, containers), kept=pods):
        yield


def test_cloud_init_has_set_the_guest_up(machine: Machine) -> None:
    assert machine.out("hostname") == "small-vm"
    assert machine.out("cat /etc/greeting") == "hello from user-data"
    assert "COLOUR='dark blue'" in machine.out("cat /etc/cloud/environment")
    assert machine.ip in machine.out("ip -4 addr show")
    assert "192.0.2.53" in machine.out("cat /etc/resolv.conf")


def test_the_guest_is_reached_by_ping_http_and_ssh(machine: Machine, key: tuple[Path, str]) -> None:
    subprocess.run(["busybox", "ping", "-c", "1", "-W", "5", machine.ip], check=True, capture_output=True)
    with urllib.request.urlopen(f"http://{machine.ip}/", timeout=10) as answer:
        assert answer.status == 200
    assert ssh(key[0], machine.ip, "hostname").strip() == "small-vm"


def test_exec_has_output_exit_codes_and_time_outs(machine: Machine) -> None:
    done = machine.exec("/bin/sh", "-c", "echo out; echo err >&2; exit 4")
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 4)
    assert machine.exec("no-such-program").exit_code == 127
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as late:
        machine.exec("sleep", "100", timeout=1)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 30


def test_a_configmap_is_live_and_scratch_is_shared(machine: Machine, volumes: Path) -> None:
    assert machine.out("cat /etc/settings/level") == "one"
    config = volumes / "kubernetes.io~configmap" / "settings"
    (config / "..2026_2").mkdir()
    (config / "..2026_2" / "level").write_text("two\n")
    (config / "..new").symlink_to("..2026_2")
    (config / "..new").replace(config / "..data")
    wait_until(lambda: machine.out("cat /etc/settings/level") == "two", lambda: "the ConfigMap stays as it was", 20)
    machine.out("echo from the guest >/scratch/file")
    assert (volumes / "kubernetes.io~empty-dir" / "scratch" / "file").read_text() == "from the guest\n"
    assert machine.exec("sh", "-c", "echo x >/etc/settings/level").exit_code != 0


def test_the_console_is_the_log(machine: Machine) -> None:
    assert "Linux version" in machine.log()
    machine.out("echo a line for the log >/dev/ttyS0")
    machine.wait_for_log("a line for the log")


def test_statistics_come_from_the_host_and_the_balloon(machine: Machine) -> None:
    def measured() -> bool:
        request = cri.ContainerStatsRequest(container_id=machine.container)
        usage = machine.daemon.runtime.ContainerStats(request).stats
        return (
            usage.cpu.usage_core_nano_seconds.value > 0
            and 0 < usage.memory.working_set_bytes.value < 1 << 30
            and usage.writable_layer.used_bytes.value > 0
        )

    wait_until(measured, lambda: "no statistics", 30)
    request = cri.PodSandboxStatsRequest(pod_sandbox_id=machine.pod)
    stats = machine.daemon.runtime.PodSandboxStats(request).stats
    assert stats.linux.network.default_interface.rx_bytes.value > 0


def test_attach_is_the_console(machine: Machine) -> None:
    with at_a_terminal(argv(machine.daemon, "attach", "shared"), 80, 24) as screen:
        screen.type(b"\necho $((6 * 7))-typed\n")
        screen.wait_for(rb"42-typed\r\n")
        screen.type(b"\x10\x11")
        screen.wait_for(rb"the container goes on")
    machine.wait_for_log("42-typed")


def test_a_port_is_forwarded(machine: Machine) -> None:
    with subprocess.Popen(argv(machine.daemon, "port-forward", "shared", ":80"), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split(b" ")[0].split(b":")[1])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                assert answer.status == 200
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def test_machines_survive_a_restart_of_the_daemon(machine: Machine) -> None:
    boot_id = machine.out("cat /proc/sys/kernel/random/boot_id")
    machine.out("(sleep 2; for i in 1 2 3; do echo said meanwhile $i; sleep 1; done) >/dev/ttyS0 2>&1 </dev/null &")
    machine.daemon.stop(signal.SIGKILL)
    time.sleep(4)
    machine.daemon.start()
    assert machine.status().state == cri.CONTAINER_RUNNING
    machine.wait_agent()
    assert machine.out("cat /proc/sys/kernel/random/boot_id") == boot_id
    for number in (1, 2, 3):
        machine.wait_for_log(f"said meanwhile {number}")
    assert machine.log().count("said meanwhile 1") == 1


def test_a_graceful_stop_is_seen_by_the_guest_and_the_disk_stays(vms: Daemon) -> None:
    machine = boot(vms, "stop", SMALL)
    machine.wait_agent()
    machine.out("echo kept >/root/note && sync")
    machine.stop(60)
    ended = machine.status()
    assert (ended.exit_code, ended.reason) == (0, "Completed")
    assert "powered off" in ended.message
    second = machine.again()
    second.wait_agent()
    assert second.out("cat /root/note") == "kept"
    assert "power button" in second.out("cat /var/log/shutdown.log")
    second.stop(0)
    assert second.status().exit_code == 137


def test_power_off_reboot_and_crash_are_told_apart(vms: Daemon) -> None:
    machine = boot(vms, "ends", SMALL)
    machine.wait_agent()
    first = machine.out("cat /proc/sys/kernel/random/boot_id")
    machine.exec("sh", "-c", "(sleep 1; reboot) >/dev/null 2>&1 &")
    time.sleep(3)
    machine.wait_agent()
    assert machine.out("cat /proc/sys/kernel/random/boot_id") != first
    assert machine.status().state == cri.CONTAINER_RUNNING
    machine.exec("sh", "-c", "(sleep 1; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &")
    ended = machine.wait_exit()
    assert (ended.exit_code, ended.reason) == (1, "Error")
    assert "panic" in ended.message
    second = machine.again()
    second.wait_agent()
    second.exec("sh", "-c", "(sleep 1; poweroff) >/dev/null 2>&1 &")
    ended = second.wait_exit()
    assert (ended.exit_code, ended.reason) == (0, "Completed")


def test_an_end_while_no_daemon_runs_is_told_by_the_next(vms: Daemon) -> None:
    machine = boot(vms, "meanwhile", SMALL)
    machine.wait_agent()
    machine.exec("sh", "-c", "(sleep 3; echo last words >/dev/ttyS0; poweroff) >/dev/null 2>&1 &")
    vms.stop()
    time.sleep(15)
    vms.start()
    ended = machine.wait_exit()
    assert (ended.exit_code, ended.reason) == (0, "Completed"), ended.message
    machine.wait_for_log("last words")


def test_what_a_vm_cannot_have_is_refused(vms: Daemon) -> None:
    pod = run_pod(vms, "refused")
    for fields, word in (
        ({"command": ["/bin/sh"]}, "config.command"),
        ({"args": ["x"]}, "config.args"),
        ({"working_dir": "/srv"}, "config.working_dir"),
        ({"devices": [cri.Device(container_path="/dev/null", host_path="/dev/null", permissions="rw")]}, "/dev/null"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            create(vms, pod, "refused", SMALL, **fields)  # type: ignore[arg-type]
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert word in str(refused.value.details())
    container = create(vms, pod, "refused", SMALL)
    with pytest.raises(grpc.RpcError) as second:
        create(vms, pod, "refused", SMALL, attempt=1)
    assert second.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    vms.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=5))


def test_all_problems_of_a_pod_are_told_together(vms: Daemon) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        run_pod(vms, "wrong", {"VirtletVCPUCount": "300", "VirtletDiskDriver": "ide", "vmruntime.io/tpm": "perhaps"})
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for word in ("VirtletVCPUCount", "VirtletDiskDriver", "vmruntime.io/tpm"):
        assert word in str(refused.value.details())


def test_an_ordinary_image_is_no_disk(vms: Daemon, busybox: str) -> None:
    image = vms.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox))).image_ref
    pod = run_pod(vms, "no-disk")
    with pytest.raises(grpc.RpcError) as refused:
        create(vms, pod, "no-disk", image)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "/disk" in str(refused.value.details())
    vms.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=image)))


def test_virtlets_own_annotation_and_the_handler_choose_the_kind(vms: Daemon) -> None:
    config = sandbox_config("virtlet", vms.base, annotations={"kubernetes.io/target-runtime": "virtlet.cloud"})
    pod = vms.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    assert json.loads(vms.runtime.PodSandboxStatus(request).info["info"])["kind"] == "image"
    config = sandbox_config("handler", vms.base)
    run = cri.RunPodSandboxRequest(config=config, runtime_handler="image")
    pod = vms.runtime.RunPodSandbox(run).pod_sandbox_id
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    assert json.loads(vms.runtime.PodSandboxStatus(request).info["info"])["kind"] == "image"


def test_a_container_that_was_never_started_can_be_stopped_and_removed(vms: Daemon) -> None:
    pod = run_pod(vms, "unstarted")
    container = create(vms, pod, "unstarted", SMALL)
    vms.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=5))
    vms.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))
    container = create(vms, pod, "unstarted", SMALL, attempt=1)
    start(vms, container)
    vms.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))
