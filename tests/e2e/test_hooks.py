"""OCI hooks: on the host for host pods, inside the container for pods in VMs, and refused where they cannot run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.daemon import Daemon, running_daemon, sandbox_config
from tests.support.pods import create, run_pod, start, status, wait_exit
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

NODE = cri.NamespaceMode.NODE
ALL = cri.NamespaceOption(network=NODE, pid=NODE, ipc=NODE)
ON_HOST = {"annotations": {"^vmruntime\\.io/kind$": "^host$"}}
ON_THE_HOST_SIDE = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
PODS_LINUX = cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(namespace_options=ALL))


class Hooks:
    """A directory of hooks whose programs write down that they ran."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.marks = directory / "marks"
        directory.mkdir()

    def add(self, name: str, script: str, stages: list[str], when: dict[str, Any] = ON_HOST) -> Path:
        """Add a shell script as a hook for each stage, which it is told as $1; its stdin is the container's state."""
        program = self.directory / f"{name}.sh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        for stage in stages:
            file = self.directory / f"{name}-{stage}.json"
            hook = {"path": str(program), "args": [name, stage], "env": ["GREETING=hello"]}
            file.write_text(json.dumps({"version": "1.0.0", "hook": hook, "when": when, "stages": [stage]}))
        return program

    def clear(self) -> None:
        for file in self.directory.iterdir():
            file.unlink()


@pytest.fixture(scope="module")
def directory(base: Path) -> Hooks:
    return Hooks(base / "hooks.d")


@pytest.fixture(scope="module")
def node(base: Path, directory: Hooks) -> Iterator[Daemon]:
    with running_daemon(base / "h", f'hooks_dirs = ["{base}/none", "{directory.directory}"]') as daemon:
        yield daemon


@pytest.fixture
def hooks(directory: Hooks) -> Iterator[Hooks]:
    yield directory
    directory.clear()


@pytest.fixture
def app(node: Daemon, busybox: str) -> str:
    request = cri.PullImageRequest(image=cri.ImageSpec(image=busybox))
    return str(node.images.PullImage(request).image_ref)


@pytest.fixture(scope="module")
def host_pod(node: Daemon) -> Iterator[str]:
    config = sandbox_config("hooked", node.base, annotations={"team": "blue"})
    config.linux.security_context.namespace_options.CopyFrom(ALL)
    pod = str(node.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)
    yield pod
    node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


def remove(node: Daemon, container: str) -> None:
    node.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))


def test_hooks_of_a_host_pod_run_on_the_host(node: Daemon, app: str, host_pod: str, hooks: Hooks) -> None:
    script = f'echo "$1 $GREETING $(cat)" >> {hooks.marks}'
    hooks.add("mark", script, list(ON_THE_HOST_SIDE))
    hooks.add("blue", f"echo blue >> {hooks.marks}", ["prestart"], {"annotations": {"^team$": "blue"}})
    hooks.add("green", f"echo green >> {hooks.marks}", ["prestart"], {"annotations": {"^team$": "green"}})
    hooks.add("mounts", f"echo mounts >> {hooks.marks}", ["prestart"], {"hasBindMounts": True})
    hooks.add("sh", f"echo sh >> {hooks.marks}", ["prestart"], {"commands": ["/sh$"]})
    container = create(node, host_pod, app, "main", "sleep 1000", linux=PODS_LINUX)

    def marks() -> dict[str, str]:
        lines = hooks.marks.read_text().splitlines()
        return {first: rest for first, _, rest in (line.partition(" ") for line in lines)}

    made = marks()
    assert list(made) == ["blue", "prestart", "sh", "createRuntime", "createContainer"]
    greeting, _, state = made["createRuntime"].partition(" ")
    told = json.loads(state)
    assert (greeting, told["id"], told["status"]) == ("hello", container, "created")
    assert Path(f"/proc/{told['pid']}").exists()  # the host's number of the process: the hook runs beside it
    assert told["annotations"]["io.kubernetes.pod.name"] == "hooked"
    assert "team" not in told["annotations"]
    node.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    assert json.loads(marks()["poststart"].partition(" ")[2])["status"] == "running"
    assert "poststop" not in marks()
    remove(node, container)
    assert json.loads(marks()["poststop"].partition(" ")[2])["status"] == "stopped"


def test_a_hook_that_fails_stops_the_container(node: Daemon, app: str, host_pod: str, hooks: Hooks) -> None:
    program = hooks.add("picky", "echo I do not like $1 >&2; exit 3", ["createRuntime"])
    with pytest.raises(grpc.RpcError) as caught:
        create(node, host_pod, app, "refused", "sleep 1000", linux=PODS_LINUX)
    assert str(program) in str(caught.value.details())
    assert "the hooks of this pod last said: I do not like createRuntime" in str(caught.value.details())
    assert not [one for one in node.containers() if status(node, one).metadata.name == "refused"]
    hooks.clear()
    container = start(node, host_pod, app, "refused", "sleep 1000", linux=PODS_LINUX)  # its name is free
    remove(node, container)


def test_a_file_that_is_no_hook_is_named(node: Daemon, app: str, host_pod: str, hooks: Hooks) -> None:
    bad = hooks.directory / "10-bad.json"
    bad.write_text(
        '{"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {"allways": true}, "stages": ["prestart"]}'
    )
    with pytest.raises(grpc.RpcError) as caught:
        create(node, host_pod, app, "unlucky", "true", linux=PODS_LINUX)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"{bad}: when: object contains unknown field `allways`" in str(caught.value.details())


def test_in_a_vm_only_what_runs_in_the_container(node: Daemon, app: str, hooks: Hooks) -> None:
    inside = {"path": "/bin/sh", "args": ["sh", "-c", "echo inside $GREETING > /tmp/mark"], "env": ["GREETING=hello"]}
    (hooks.directory / "inside.json").write_text(
        json.dumps({"version": "1.0.0", "hook": inside, "when": {"always": True}, "stages": ["startContainer"]})
    )
    hooks.add("host-only", f"touch {hooks.marks}", ["createRuntime"])
    pod = run_pod(node, "vm")
    try:
        container = start(node, pod, app, "main", "cat /tmp/mark")
        ended = wait_exit(node, container)
        assert "stdout F inside hello" in Path(ended.log_path).read_text()
        everywhere = hooks.add("everywhere", f"touch {hooks.marks}", ["prestart"], {"always": True})
        with pytest.raises(grpc.RpcError) as caught:
            create(node, pod, app, "second", "true")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        details = str(caught.value.details())
        assert f"{everywhere.with_name('everywhere-prestart.json')} (prestart) matches this container" in details
        assert "hooks_in_vms" in details
        assert not os.path.exists(hooks.marks)
    finally:
        node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
