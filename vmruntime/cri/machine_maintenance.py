"""vmruntime's own calls on the machines of image pods, which CRI does not have (proto/maintenance.proto)."""

from __future__ import annotations

from typing import Any

from vmruntime.cri.lookup import full_id
from vmruntime.cri.ports import Machines
from vmruntime.generated import maintenance_pb2 as own
from vmruntime.generated.maintenance_pb2_grpc import MachineMaintenanceServicer
from vmruntime.pods.interface import Pods


class MachineMaintenance(MachineMaintenanceServicer):
    """Every method of vmruntime.v1.MachineMaintenance."""

    def __init__(self, pods: Pods, machines: Machines) -> None:
        self._pods = pods
        self._machines = machines

    async def ListPodKinds(self, request: own.ListPodKindsRequest, context: Any) -> own.ListPodKindsResponse:
        """Return what kind each pod is of."""
        kinds = [own.PodKind(pod_sandbox_id=one.id, kind=one.spec.kind.value) for one in self._pods.sandboxes()]
        return own.ListPodKindsResponse(pods=kinds)

    async def PauseMachine(self, request: own.PauseMachineRequest, context: Any) -> own.PauseMachineResponse:
        """Hold a machine's processors."""
        await self._machines.pause(self._sandbox_id(request.pod_sandbox_id))
        return own.PauseMachineResponse()

    async def ResumeMachine(self, request: own.ResumeMachineRequest, context: Any) -> own.ResumeMachineResponse:
        """Let them go on."""
        await self._machines.resume(self._sandbox_id(request.pod_sandbox_id))
        return own.ResumeMachineResponse()

    async def ResetMachine(self, request: own.ResetMachineRequest, context: Any) -> own.ResetMachineResponse:
        """Press the reset button."""
        await self._machines.reset(self._sandbox_id(request.pod_sandbox_id))
        return own.ResetMachineResponse()

    def _sandbox_id(self, given: str) -> str:
        return full_id("pod_sandbox_id", given, lambda: (one.id for one in self._pods.sandboxes()))
