"""CRI's calls that this version does not answer, each with what is missing and what to do instead (adr/0005)."""

from __future__ import annotations

from typing import Any, NoReturn

from vmruntime.cri.translate.checks import shorten
from vmruntime.errors import Unimplemented
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer

_OF_CONTAINERS = (
    "single containers cannot be checkpointed: that takes CRIU beside the OCI runtime, and guests have none"
)
_OF_PODS = (
    "pods cannot be checkpointed or restored: a VM's volumes (virtio-fs) and network connections are not part of its state,"
    " and containers would have to be given other ids and mounts while they are frozen"
)
_REMEDY = "let the application save its state in a volume, and start the pod anew"


class NotBuilt(RuntimeServiceServicer):
    """Methods that answer UNIMPLEMENTED."""

    async def CheckpointContainer(self, request: cri.CheckpointContainerRequest, context: Any) -> NoReturn:
        """Say what is missing."""
        raise Unimplemented(f"container_id: {shorten(request.container_id)}: {_OF_CONTAINERS}", remedy=_REMEDY)

    async def CheckpointPod(self, request: cri.CheckpointPodRequest, context: Any) -> NoReturn:
        """Say what is missing."""
        raise Unimplemented(f"pod_sandbox_id: {shorten(request.pod_sandbox_id)}: {_OF_PODS}", remedy=_REMEDY)

    async def RestorePod(self, request: cri.RestorePodRequest, context: Any) -> NoReturn:
        """Say what is missing."""
        raise Unimplemented(f"checkpoint_path: {shorten(request.checkpoint_path)}: {_OF_PODS}", remedy=_REMEDY)
