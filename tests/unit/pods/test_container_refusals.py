"""Containers that cannot be created or started: what is told, and that nothing is left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.pods.bed import PATIENCE, TRAP, Daemon, state, until_ready
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.interface import PidMode
from vmruntime.errors import (
    Code,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from vmruntime.model.container import ContainerState, SecurityContext
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import NamespaceMode, Namespaces


async def test_an_image_that_is_not_there(daemon: Daemon, pod: str) -> None:
    with pytest.raises(NotFound, match=r"config\.image: 'no/where:1' is not on this host") as missing:
        await daemon.create(pod, image="no/where:1")
    assert missing.value.remedy == "pull it first"
    daemon.pod_as_new(pod)
    await daemon.nothing_left(pods=1)


async def test_a_sandbox_that_is_not_there(daemon: Daemon) -> None:
    with pytest.raises(NotFound, match="no sandbox has the id 'none'"):
        await daemon.create("none")
    await daemon.nothing_left()


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"cdi_devices": ["vendor.com/gpu=0"]}, NotFound, r"CDI_devices\[0\].name: 'vendor.com/gpu=0'"),
        (
            {"security": SecurityContext(namespaces=Namespaces(pid=NamespaceMode.NODE))},
            FailedPrecondition,
            "namespace_options.pid: NODE",
        ),
        (
            {"security": SecurityContext(namespaces=Namespaces(pid=NamespaceMode.TARGET, target_id="none"))},
            NotFound,
            "'none'",
        ),
        ({"security": SecurityContext(run_as_username="nobody-knows")}, AgentError, "nobody-knows"),
        ({"security": SecurityContext(add_capabilities=["FLY"])}, InvalidArgument, "FLY"),
        ({"stop_signal": "SIGNONE"}, InvalidArgument, "SIGNONE"),
        ({"log_path": "/dev/null/log"}, FailedPrecondition, "log_path"),
        ({"resources": LinuxResources(memory_limit=1 << 50)}, InvalidArgument, "memory_limit_in_bytes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_container_that_cannot_be(
    daemon: Daemon, pod: str, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        await daemon.create(pod, **fields)
    daemon.pod_as_new(pod)
    await daemon.nothing_left(pods=1)


async def test_the_processes_of_another_container(daemon: Daemon, pod: str) -> None:
    def target(container: str) -> SecurityContext:
        return SecurityContext(namespaces=Namespaces(pid=NamespaceMode.TARGET, target_id=container))

    first = await daemon.run(pod)
    second = await daemon.create(pod, name="debug", security=target(first))
    request = daemon.machine(pod).guest.containers[second].request
    assert (request.pid_mode, request.pid_target) == (PidMode.TARGET, first)
    elsewhere = await daemon.run(await daemon.run_pod("other"))
    for wrong in (second, elsewhere):  # created only; of another pod
        with pytest.raises(FailedPrecondition, match=f"target_id: '{wrong}' is not a running container of this pod"):
            await daemon.create(pod, name="wrong", security=target(wrong))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ('exec: "tool": executable file not found in $PATH', 127),
        ('exec: "/bin/tool": stat /bin/tool: no such file or directory', 127),
        ("open executable: Permission denied (exec)", 126),
        ("exec format error", 126),
        ("exec of something else", 128),
    ],
)
async def test_a_command_that_cannot_be_run(daemon: Daemon, pod: str, answer: str, code: int) -> None:
    """The container exists and its start fails: kubelet shows the message and backs off."""
    daemon.faults.fail("agent.create", AgentError(answer, Code.INVALID_ARGUMENT))
    container = await daemon.create(pod, "tool")
    assert state(daemon, container) is ContainerState.CREATED
    with pytest.raises(FailedPrecondition) as failed:
        await daemon.pods.start_container(container)
    assert str(failed.value) == f"the container {container} could not be started: {answer}"
    ended = await daemon.ended(container)
    assert (ended.exit_code, ended.reason, ended.message) == (code, "StartError", answer)
    assert ended.started_at == ended.finished_at > ended.created_at
    await daemon.pods.remove_container(container)
    daemon.pod_as_new(pod)


async def test_a_start_that_the_guest_refuses(daemon: Daemon, pod: str) -> None:
    container = await daemon.create(pod)
    daemon.faults.fail("agent.start", AgentError("open executable: Permission denied", Code.INTERNAL))
    with pytest.raises(FailedPrecondition, match="could not be started: open executable"):
        await daemon.pods.start_container(container)
    assert daemon.pods.container(container).exit_code == 126
    await daemon.pods.remove_container(container)
    daemon.pod_as_new(pod)


async def test_a_start_whose_answer_is_lost(daemon: Daemon, pod: str) -> None:
    """It runs in the guest; that is what is told, whatever became of the answer."""
    container = await daemon.create(pod, "sh", "-c", TRAP)
    daemon.faults.fail("agent.start done", AgentGone("the connection broke"))
    await daemon.pods.start_container(container)
    found = daemon.pods.container(container)
    assert (found.state, found.started_at > found.created_at) == (ContainerState.RUNNING, True)
    await until_ready(daemon)
    await daemon.pods.stop_container(container, PATIENCE)
    assert daemon.pods.container(container).exit_code == 7


async def test_a_start_that_did_not_reach_the_guest(daemon: Daemon, pod: str) -> None:
    container = await daemon.create(pod)
    daemon.faults.fail("agent.start", AgentGone("the connection broke"))
    with pytest.raises(AgentGone, match="the connection broke"):
        await daemon.pods.start_container(container)
    assert state(daemon, container) is ContainerState.CREATED
    await daemon.pods.start_container(container)  # kubelet's next attempt


async def test_a_start_that_ends_with_the_vm(daemon: Daemon, pod: str) -> None:
    container = await daemon.create(pod)
    start = daemon.faults.hold("agent.start")
    starting = asyncio.ensure_future(daemon.pods.start_container(container))
    await start.reached.wait()
    await daemon.machine(pod).end("the power went")
    with pytest.raises(AgentGone, match="the pod's VM ended meanwhile: the power went"):
        await starting
    ended = await daemon.ended(container)
    assert (ended.exit_code, ended.message) == (255, "the pod's VM ended: the power went")


async def test_starts_at_once(daemon: Daemon, pod: str) -> None:
    container = await daemon.create(pod)
    calls = [daemon.pods.start_container(container) for _ in range(3)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(one) for one in outcomes] == [type(None), FailedPrecondition, FailedPrecondition]
    with pytest.raises(NotFound):
        await daemon.pods.start_container("unknown")
