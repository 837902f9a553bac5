from __future__ import annotations

import grpc

from tests.unit.cri.conftest import Rig
from tests.unit.cri.test_runtime_service import refused
from vmruntime.errors import FailedPrecondition
from vmruntime.generated import maintenance_pb2 as own

Code = grpc.StatusCode


async def test_kinds_of_pods(rig: Rig) -> None:
    assert not (await rig.machine_maintenance.ListPodKinds(own.ListPodKindsRequest())).pods
    ids = [await rig.sandbox(name) for name in ("a", "b")]
    pods = (await rig.machine_maintenance.ListPodKinds(own.ListPodKindsRequest())).pods
    assert sorted((pod.pod_sandbox_id, pod.kind) for pod in pods) == [(one, "container") for one in sorted(ids)]


async def test_what_is_done_to_machines(rig: Rig) -> None:
    pod = await rig.sandbox()
    stub = rig.machine_maintenance
    await stub.PauseMachine(own.PauseMachineRequest(pod_sandbox_id=pod))
    await stub.ResumeMachine(own.ResumeMachineRequest(pod_sandbox_id=pod[:6]))
    await stub.ResetMachine(own.ResetMachineRequest(pod_sandbox_id=pod))
    assert rig.machines.done == [("pause", pod), ("resume", pod), ("reset", pod)]


async def test_refusals(rig: Rig) -> None:
    code, details = await refused(rig.machine_maintenance.PauseMachine(own.PauseMachineRequest()))
    assert (code, "pod_sandbox_id" in details) == (Code.INVALID_ARGUMENT, True)
    rig.machines.fail = FailedPrecondition("the VM does not run")
    code, details = await refused(rig.machine_maintenance.ResetMachine(own.ResetMachineRequest(pod_sandbox_id="x")))
    assert (code, details) == (Code.FAILED_PRECONDITION, "the VM does not run")
