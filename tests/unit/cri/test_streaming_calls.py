from __future__ import annotations

import pytest

from tests.unit.cri.conftest import Rig
from tests.unit.cri.test_runtime_service import Code, refused
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec


async def running(rig: Rig) -> str:
    container_id = await rig.container(await rig.sandbox())
    await rig.runtime.StartContainer(cri.StartContainerRequest(container_id=container_id))
    return container_id


async def test_exec(rig: Rig) -> None:
    container_id = await running(rig)
    request = cri.ExecRequest(container_id=container_id[:8], cmd=["sh", "-c", "x"], tty=True, stdin=True, stdout=True)
    assert (await rig.runtime.Exec(request)).url == "http://127.0.0.1:1/1"
    assert rig.streams.asked == [
        ExecSpec(container_id=container_id, argv=["sh", "-c", "x"], tty=True, stdin=True, stdout=True, stderr=False)
    ]


async def test_attach_even_before_the_start(rig: Rig) -> None:
    container_id = await rig.container(await rig.sandbox())
    request = cri.AttachRequest(container_id=container_id, stdout=True, stderr=True)
    assert (await rig.runtime.Attach(request)).url
    assert rig.streams.asked == [AttachSpec(container_id=container_id)]
    await rig.runtime.StopContainer(cri.StopContainerRequest(container_id=container_id))
    assert (await refused(rig.runtime.Attach(request)))[0] is Code.FAILED_PRECONDITION


async def test_port_forward(rig: Rig) -> None:
    sandbox_id = await rig.sandbox()
    assert (await rig.runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=sandbox_id, port=[80, 81]))).url
    assert rig.streams.asked == [PortForwardSpec(sandbox_id=sandbox_id, ports=[80, 81])]
    for ports in ([0], [65536], [-1], [80, 80]):
        request = cri.PortForwardRequest(pod_sandbox_id=sandbox_id, port=ports)
        assert (await refused(rig.runtime.PortForward(request)))[0] is Code.INVALID_ARGUMENT
    await rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox_id))
    request = cri.PortForwardRequest(pod_sandbox_id=sandbox_id)
    assert (await refused(rig.runtime.PortForward(request)))[0] is Code.FAILED_PRECONDITION
    assert (await refused(rig.runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id="9"))))[0] is Code.NOT_FOUND


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"stdout": True, "cmd": []}, Code.INVALID_ARGUMENT),
        ({"stdout": True, "cmd": [""]}, Code.INVALID_ARGUMENT),
        ({"cmd": ["x"]}, Code.INVALID_ARGUMENT),
        ({"cmd": ["x"], "stderr": True, "tty": True}, Code.INVALID_ARGUMENT),
        ({"cmd": ["x"], "stdout": True, "container_id": "9" * 64}, Code.NOT_FOUND),
        ({"cmd": ["x"], "stdout": True, "container_id": ""}, Code.INVALID_ARGUMENT),
    ],
)
async def test_execs_that_cannot_be(rig: Rig, fields: dict[str, object], code: Code) -> None:
    container_id = await running(rig)
    request = cri.ExecRequest(**{"container_id": container_id, **fields})  # type: ignore[arg-type]
    assert (await refused(rig.runtime.Exec(request)))[0] is code


async def test_exec_needs_a_running_container(rig: Rig) -> None:
    container_id = await rig.container(await rig.sandbox())
    request = cri.ExecRequest(container_id=container_id, cmd=["x"], stdout=True)
    code, details = await refused(rig.runtime.Exec(request))
    assert (code, "is created, not running" in details) == (Code.FAILED_PRECONDITION, True)
