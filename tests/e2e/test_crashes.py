"""Programs that are killed while pods are made: QEMU, the vsock helper, the daemon itself.

Whatever the moment: the call fails soon and says why (or succeeded, and the pod is then reported as dead), nothing is
left, and the same request works when it is repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support import leaks
from tests.support.daemon import Daemon, container_config, running_daemon, sandbox_config
from tests.support.pods import create, run_pod, sh, start, status
from tests.support.registry import registries_conf
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

SOON = 20.0
"""Seconds in which a call has to notice that its VM is gone; booting takes a few of them."""


@pytest.fixture(scope="module")
def node(base: Path) -> Iterator[Daemon]:
    with running_daemon(
        base / "crashes", '[start]\nsource = "cold"\n'
    ) as daemon:  # a guest of a template would boot instead
        yield daemon


@pytest.fixture(autouse=True)
def clean(node: Daemon) -> Iterator[None]:
    with leaks.nothing_left(node.footprint, lambda: node.remove_all_but(frozenset())):
        yield


@pytest.fixture(scope="module")
def image(node: Daemon, busybox: str) -> str:
    request = cri.PullImageRequest(image=cri.ImageSpec(image=busybox))
    return str(node.images.PullImage(request).image_ref)


def request(daemon: Daemon, name: str) -> Any:
    return cri.RunPodSandboxRequest(config=sandbox_config(name, daemon.base))


def processes(daemon: Daemon) -> dict[str, int]:
    """Return the pids of the newest sandbox's processes by role, from the ledger."""
    uri = f"file:{daemon.root}/vmruntime.db?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=5)
    try:
        rows = connection.execute("SELECT key, record FROM resources WHERE kind = 'process' ORDER BY seq").fetchall()
    finally:
        connection.close()
    return {json.loads(record)["data"]["role"]: int(key) for key, record in rows}


def connected(socket: str) -> bool:
    """Whether somebody is connected to a unix socket of this name: state 03, proc(5)."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return any(fields[-1].endswith(socket) and fields[5] == "03" for fields in lines)


def console(daemon: Daemon) -> str:
    return "".join(path.read_text(errors="replace") for path in daemon.run.glob("sandboxes/*/console.log"))


Step = Callable[[Daemon], bool]
STEPS: dict[str, Step] = {
    "recorded": lambda daemon: True,
    "monitor": lambda daemon: connected(f"{next(daemon.run.glob('sandboxes/*'), daemon.run)}/qmp.sock"),
    "console": lambda daemon: bool(console(daemon)),
    "listening": lambda daemon: "ready" in console(daemon),
    "talking": lambda daemon: connected(f"{next(daemon.run.glob('sandboxes/*'), daemon.run)}/agent.sock"),
}


def kill_at(daemon: Daemon, role: str, reached: Step, delay: float = 0.0) -> None:
    """Kill a process of the sandbox under construction once a step is reached."""
    deadline = time.monotonic() + SOON
    while role not in (found := processes(daemon)) or not reached(daemon):
        assert time.monotonic() < deadline, "the step was never reached"
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(found[role], signal.SIGKILL)


def outcome(daemon: Daemon, call: Any) -> str:
    """Wait for a RunPodSandbox whose VM was killed, and return what was said about it."""
    began = time.monotonic()
    try:
        pod = call.result(timeout=SOON).pod_sandbox_id
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() in (
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.FAILED_PRECONDITION,
        )
        assert "internal error" not in str(error.details())
        return str(error.details())
    deadline = began + SOON
    while True:
        found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
        if found.status.state == cri.SANDBOX_NOTREADY:
            daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
            return str(json.loads(found.info["info"])["reason"])
        assert time.monotonic() < deadline, "the pod's death was not noticed"
        time.sleep(0.05)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("role", ["qemu", "vsock"])
def test_a_vm_killed_while_it_starts(node: Daemon, role: str, step: str) -> None:
    call = node.runtime.RunPodSandbox.future(request(node, "doomed"))
    kill_at(node, role, STEPS[step])
    said = outcome(node, call)
    assert {"qemu": "QEMU", "vsock": "vsock"}[role].lower() in said.lower(), said
    assert leaks.settle(node.footprint, set()) == []
    run_pod(node, "doomed")  # the name is free


def test_a_vm_killed_at_any_moment(node: Daemon) -> None:
    """Moments between the steps above."""
    chance = random.Random(seed := random.randrange(10**6))
    for number in range(6):
        call = node.runtime.RunPodSandbox.future(request(node, f"any-{number}"))
        kill_at(node, chance.choice(["qemu", "vsock"]), STEPS["recorded"], chance.uniform(0, 2.0))
        assert outcome(node, call), seed
        assert leaks.settle(node.footprint, set()) == [], seed


def test_a_vm_killed_while_it_is_used(node: Daemon, image: str) -> None:
    """Calls into the guest do not hang when it goes: they fail, and the pod's containers have ended."""
    pod = run_pod(node, "used")
    container = start(node, pod, image, "main", "sleep 1000")
    argv = cri.ExecSyncRequest(container_id=container, cmd=["/bin/sleep", "1000"])
    call = node.runtime.ExecSync.future(argv)
    time.sleep(0.5)
    os.kill(processes(node)["qemu"], signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as failed:
        call.result(timeout=SOON)
    assert failed.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
    deadline = time.monotonic() + SOON
    while status(node, container).state != cri.CONTAINER_EXITED:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "VM ended" in status(node, container).message


def restart(daemon: Daemon) -> None:
    daemon.stop(signal.SIGKILL)
    daemon.start()


def test_a_daemon_killed_while_a_pod_starts(node: Daemon, image: str) -> None:
    """Half-made pods are undone by the next daemon; a pod that was ready is taken over, network, log and all."""
    chance = random.Random(seed := random.randrange(10**6))
    ready = run_pod(node, "ready")
    container = start(node, ready, image, "main", "sleep 1000")
    before = leaks.find(node.footprint)
    moments = [0.02, 0.1, 0.2, 0.4, *(chance.uniform(0, 2.0) for _ in range(4))]
    for number, moment in enumerate(moments):
        call = node.runtime.RunPodSandbox.future(request(node, f"half-{number}"))
        time.sleep(moment)
        restart(node)
        with contextlib.suppress(grpc.RpcError):  # it may have been done
            call.result(timeout=SOON)
        made = [one for one in node.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items if one.id != ready]
        for one in made:  # it was ready a moment before
            assert one.state == cri.SANDBOX_READY, (seed, moment)
            node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=one.id))
        assert leaks.settle(node.footprint, before) == [], (seed, moment)
    assert sh(node, container, "echo here").stdout == b"here\n"
    run_pod(node, "half-0")


def test_a_daemon_killed_while_a_container_is_made(node: Daemon, image: str) -> None:
    chance = random.Random(seed := random.randrange(10**6))
    pod = run_pod(node, "host")
    before = leaks.find(node.footprint)
    for number in range(6):
        config = container_config(f"c{number}", image, ["/bin/sh", "-c", "echo started; sleep 1000"])
        wanted = cri.CreateContainerRequest(
            pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config("host", node.base)
        )
        call = node.runtime.CreateContainer.future(wanted)
        moment = chance.uniform(0, 0.25)
        time.sleep(moment)
        restart(node)
        with contextlib.suppress(grpc.RpcError):  # it may have been done
            call.result(timeout=SOON)
        for one in node.runtime.ListContainers(cri.ListContainersRequest()).containers:
            assert one.state == cri.CONTAINER_CREATED, (seed, moment)
            node.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=one.id))
        assert leaks.settle(node.footprint, before, kept=[pod]) == [], (seed, moment)
        container = node.runtime.CreateContainer(wanted).container_id  # the retry
        node.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
        assert sh(node, container, "echo here").stdout == b"here\n"
        node.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))


def test_a_daemon_killed_while_pods_are_removed(node: Daemon, image: str) -> None:
    for number, moment in enumerate((0.01, 0.05, 0.15, 0.3)):
        pod = run_pod(node, f"going-{number}")
        create(node, pod, image, "main", "true")
        call = node.runtime.RemovePodSandbox.future(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
        time.sleep(moment)
        restart(node)
        call.cancel()
        node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
        assert node.pods() == frozenset()
        assert leaks.settle(node.footprint, set()) == [], moment


def test_a_daemon_killed_while_it_pulls(base: Path) -> None:
    """A registry that says nothing: the program that waits for it goes with the daemon."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        conf = registries_conf(base / "silent.conf", {"silent.example": address})
        with running_daemon(base / "silent", f'[images]\nregistries_conf = "{conf}"') as daemon:
            spec = cri.ImageSpec(image="silent.example/app:1")
            call = daemon.images.PullImage.future(cri.PullImageRequest(image=spec))
            assert until(lambda: pulling(daemon))
            daemon.stop(signal.SIGKILL)
            assert until(lambda: not pulling(daemon), 2.0)
            daemon.start()
            call.cancel()


def pulling(daemon: Daemon) -> bool:
    return any("skopeo" in one for one in leaks.processes(daemon.footprint, set()))


def until(true: Callable[[], bool], seconds: float = SOON) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def test_callers_that_go_away_leave_their_pod_to_the_retry(node: Daemon) -> None:
    """kubelet gives up after its time-out and asks again: it gets the pod that was made for it meanwhile."""
    wanted = request(node, "patience")
    with pytest.raises(grpc.RpcError) as late:
        node.runtime.RunPodSandbox(wanted, timeout=0.3)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    pod = node.runtime.RunPodSandbox(wanted, timeout=SOON).pod_sandbox_id
    assert node.pods() == {pod}
