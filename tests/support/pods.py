"""Pods and containers through a daemon's CRI socket, for tests."""

from __future__ import annotations

import time
from typing import Any

from tests.support.daemon import Daemon, container_config, sandbox_config
from vmruntime.generated import cri_pb2 as cri


def run_pod(daemon: Daemon, name: str, **fields: Any) -> str:
    config = sandbox_config(name, daemon.base, **fields)
    return str(daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)


def create(daemon: Daemon, pod: str, image: str, name: str, script: str, **fields: Any) -> str:
    status = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    config = container_config(name, image, ["/bin/sh", "-c", script], **fields)
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config(status.metadata.name, daemon.base)
    )
    return str(daemon.runtime.CreateContainer(request).container_id)


def start(daemon: Daemon, pod: str, image: str, name: str, script: str, **fields: Any) -> str:
    container = create(daemon, pod, image, name, script, **fields)
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    return container


def status(daemon: Daemon, container: str) -> Any:
    return daemon.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container)).status


def wait_exit(daemon: Daemon, container: str) -> Any:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = status(daemon, container)
        if found.state == cri.CONTAINER_EXITED:
            return found
        time.sleep(0.05)
    raise AssertionError(f"still running: {found}")


def sh(daemon: Daemon, container: str, script: str, timeout: int = 10) -> Any:
    return daemon.runtime.ExecSync(
        cri.ExecSyncRequest(container_id=container, cmd=["/bin/sh", "-c", script], timeout=timeout)
    )


def ask(daemon: Daemon, container: str, address: str) -> bytes:
    """Connect to port 7000 until somebody listens there: between two answers the server does not."""
    deadline = time.monotonic() + 20
    while not (answer := sh(daemon, container, f"nc {address} 7000 </dev/null").stdout):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return bytes(answer)


def out(daemon: Daemon, container: str, script: str) -> str:
    """Run a script that succeeds, and return what it wrote, without blanks around it."""
    answer = sh(daemon, container, script)
    assert answer.exit_code == 0, answer
    return str(answer.stdout.decode().strip())
