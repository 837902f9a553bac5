"""Pods that start from templates and warm VMs: as much their own as if each had booted, and nothing left of what goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support import leaks
from tests.support.daemon import Daemon, running_daemon
from tests.support.pods import out, run_pod, start
from vmruntime.aio.detached import start_time
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

PATIENCE = 60.0
IDENTITY = (
    "head -c 64 /dev/urandom | base64 | head -n 1; cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid;"
    " cat /sys/class/net/eth0/address; hostname; cut -d' ' -f1 /proc/uptime; date +%s"
)
"""In a container of a pod: random bytes, the boot's id, a new uuid, the MAC address, the host name, uptime, the time."""


def start_state(daemon: Daemon) -> dict[str, Any]:
    answer = daemon.runtime.Status(cri.StatusRequest(verbose=True))
    found: dict[str, Any] = json.loads(answer.info["start"])
    return found


def until(daemon: Daemon, reached: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached(state := start_state(daemon)):
        assert time.monotonic() < deadline, f"{state}\n{daemon.log.read_text()[-3000:]}"
        time.sleep(0.05)


def template_ready(daemon: Daemon, memory_mib: int = 512) -> None:
    until(daemon, lambda state: state["templates"].get(str(memory_mib)) == "ready")


def warm(daemon: Daemon, number: int) -> None:
    until(daemon, lambda state: state["warm"] == number)


def info(daemon: Daemon, pod: str) -> dict[str, Any]:
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    found: dict[str, Any] = json.loads(daemon.runtime.PodSandboxStatus(request).info["info"])
    return found


def pull(daemon: Daemon, image: str) -> str:
    return str(daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=image))).image_ref)


def remove(daemon: Daemon, *pods: str) -> None:
    for pod in pods:
        daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


def spares(daemon: Daemon) -> dict[str, int]:
    """Return the pids of QEMU of the VMs that wait, by their ids."""
    uri = f"file:{daemon.root}/vmruntime.db?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as connection:
        rows = connection.execute("SELECT kind, key, owner, record FROM resources").fetchall()
    waiting = {owner for kind, _, owner, _ in rows if kind == "spare"}
    return {
        owner: int(key)
        for kind, key, owner, record in rows
        if kind == "process" and owner in waiting and json.loads(record)["data"]["role"] == "qemu"
    }


@pytest.fixture(scope="module")
def node(base: Path) -> Iterator[Daemon]:
    """A daemon that has a template."""
    with running_daemon(base / "start") as daemon:
        template_ready(daemon)
        yield daemon


@pytest.fixture(scope="module")
def image(node: Daemon, busybox: str) -> str:
    return pull(node, busybox)


@pytest.fixture(scope="module")
def pool(base: Path) -> Iterator[Daemon]:
    """A daemon with two VMs that wait."""
    with running_daemon(base / "pool", '[start]\nsource = "auto"\nwarm = 2\n') as daemon:
        warm(daemon, 2)
        yield daemon


def identities(daemon: Daemon, image: str, source: str) -> None:
    """Run two pods beside each other, of one template, and compare all that a guest may be told by."""
    pods = [run_pod(daemon, f"{source}-{number}", hostname=f"{source}-{number}") for number in range(2)]
    assert [info(daemon, pod)["source"] for pod in pods] == [source, source]
    seen = []
    for pod in pods:
        container = start(daemon, pod, image, "main", "head -c 64 /dev/urandom | base64 | head -n 1; sleep 1000")
        before = time.time()
        *identity, uptime, clock = out(daemon, container, IDENTITY).split()
        assert before - 2 <= int(clock) <= time.time() + 2
        assert float(uptime) < 3600
        log = next(daemon.base.glob(f"logs/{source}-{pods.index(pod)}/main.log")).read_text()
        seen.append([*identity, log.split()[3]])
    for number, values in enumerate(zip(*seen, strict=True)):
        assert values[0] != values[1], (number, values)
    assert [values[4] for values in seen] == [f"{source}-0", f"{source}-1"]
    assert seen[0][3] == info(daemon, pods[0])["interfaces"][0]["mac"]
    remove(daemon, *pods)


def test_guests_of_one_template_share_nothing_that_tells_or_predicts_them(node: Daemon, image: str) -> None:
    with leaks.nothing_left(node.footprint, lambda: node.remove_all_but(frozenset())):
        identities(node, image, "template")


def test_the_same_of_warm_vms(pool: Daemon, busybox: str) -> None:
    image = pull(pool, busybox)
    identities(pool, image, "warm")
    warm(pool, 2)


def test_pods_are_as_large_as_they_ask(node: Daemon, image: str) -> None:
    """Their template is smaller: processors and memory are plugged in, and no more of it than was asked for."""
    limits = cri.LinuxContainerResources(memory_limit_in_bytes=900 << 20, cpu_quota=200_000, cpu_period=100_000)
    pod = run_pod(node, "large", linux=cri.LinuxPodSandboxConfig(resources=limits))
    container = start(node, pod, image, "main", "sleep 1000")
    expected = (900 + 96) * 1024  # plus what rounding up to 4 MiB may add
    deadline = time.monotonic() + PATIENCE
    while True:  # memory comes when the guest has made room for it
        memory, processors = out(node, container, "head -n 1 /proc/meminfo; grep -c ^processor /proc/cpuinfo").split()[
            1::2
        ]
        if int(memory) > 0.93 * expected:
            break
        assert time.monotonic() < deadline, (memory, expected)
        time.sleep(0.2)
    assert int(memory) <= expected + 4096
    assert int(processors) == 2
    assert info(node, pod)["source"] == "template"
    remove(node, pod)


def test_what_happens_to_a_templates_files_does_not_reach_its_pods(node: Daemon, image: str) -> None:
    """Cut while a pod runs: that pod, the next one and the next daemon's do not mind."""
    (directory,) = (node.root / "templates").iterdir()
    first = run_pod(node, "first")
    container = start(node, first, image, "main", "sleep 1000")
    os.truncate(directory / "memory", 4096)
    assert out(node, container, "cat /bin/busybox | wc -c").isdecimal()
    second = run_pod(node, "second")
    assert info(node, second)["source"] == "template"
    node.stop()
    node.start()
    assert out(node, container, "echo alive") == "alive"
    template_ready(node)
    assert "has another length" in node.log.read_text()
    third = run_pod(node, "third")
    assert info(node, third)["source"] == "template"
    remove(node, first, second, third)


def test_a_guest_that_cannot_come_back_boots(node: Daemon) -> None:
    """Its QEMU is killed while it is brought back."""
    call = node.runtime.RunPodSandbox.future(_request(node, "killed"))
    deadline = time.monotonic() + PATIENCE
    killed = 0
    while not killed and not call.done():
        for path in node.run.glob("sandboxes/*/qmp.sock"):
            pid = _pid_of(str(path.parent.name))
            if pid:
                os.kill(pid, signal.SIGKILL)
                killed = pid
                break
        assert time.monotonic() < deadline
        time.sleep(0.001)
    try:
        pod = call.result(timeout=PATIENCE).pod_sandbox_id
    except grpc.RpcError as error:  # it was killed when the guest had come back
        assert "QEMU" in str(error)
        return
    assert info(node, pod)["source"] in ("cold", "template")
    remove(node, pod)
    template_ready(node)


def test_warm_vms_that_are_killed_are_replaced(pool: Daemon) -> None:
    warm(pool, 2)
    before = spares(pool)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while set(spares(pool)) & set(before) or len(spares(pool)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    warm(pool, 2)
    pod = run_pod(pool, "after")
    assert info(pool, pod)["source"] == "warm"
    remove(pool, pod)


def test_a_warm_vm_killed_in_the_moment_it_is_taken(pool: Daemon) -> None:
    for number in range(3):
        warm(pool, 2)
        waiting = list(spares(pool).values())
        call = pool.runtime.RunPodSandbox.future(_request(pool, f"taken-{number}"))
        time.sleep(0.01 * number)
        for pid in waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            pod = call.result(timeout=PATIENCE).pod_sandbox_id
        except grpc.RpcError as error:
            assert "QEMU" in str(error) or "VM" in str(error), error
        else:
            remove(pool, pod)


def test_a_killed_daemons_warm_vms_end_and_its_pods_do_not(pool: Daemon, busybox: str) -> None:
    image = pull(pool, busybox)
    warm(pool, 2)
    pod = run_pod(pool, "stays")
    container = start(pool, pod, image, "main", "sleep 1000")
    warm(pool, 2)
    waiting = spares(pool)
    pool.stop(signal.SIGKILL)
    assert all(start_time(pid) for pid in waiting.values())
    pool.start()
    warm(pool, 2)
    assert not set(waiting) & set(spares(pool))
    assert not any(start_time(pid) for pid in waiting.values())
    assert "releasing what nobody owns" not in pool.log.read_text()
    assert out(pool, container, "echo alive") == "alive"
    remove(pool, pod)


def test_a_daemon_that_stops_leaves_no_warm_vm(pool: Daemon) -> None:
    warm(pool, 2)
    waiting = spares(pool)
    pool.stop()
    assert spares(pool) == {}
    assert not any(start_time(pid) for pid in waiting.values())
    pool.start()
    warm(pool, 2)


def test_pods_that_share_a_templates_memory_mount_no_files_of_the_host(node: Daemon, image: str) -> None:
    pod = run_pod(node, "alone", annotations={"vmruntime.io/share": "none"})
    mount = cri.Mount(container_path="/host", host_path=str(node.base))
    with pytest.raises(grpc.RpcError) as refused:
        start(node, pod, image, "main", "true", mounts=[mount])
    assert "vmruntime.io/share" in str(refused.value.details())
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    container = start(node, pod, image, "other", "sleep 1000")
    assert out(node, container, "echo fine") == "fine"
    remove(node, pod)


def _request(daemon: Daemon, name: str) -> Any:
    config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=name, uid=name, namespace="test"),
        log_directory=str(daemon.base / "logs" / name),
        linux=cri.LinuxPodSandboxConfig(),
    )
    return cri.RunPodSandboxRequest(config=config)


def _pid_of(short_id: str) -> int:
    """Return the pid of a sandbox's QEMU; 0: there is none yet."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (directory / "cmdline").read_bytes()
            if b"qemu-system" in command.split(b"\0")[0] and f"guest=vmruntime-{short_id}".encode() in command:
                return int(directory.name)
    return 0
