"""CRI's calls that this version does not answer, each with what to use instead where there is something."""

from __future__ import annotations

from typing import Any, NoReturn

from vmruntime.errors import Unimplemented
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer

_STREAMING = "the streaming server for exec, attach and port-forward is not built in this version"
_CHECKPOINT = "checkpoint and restore are not built"


class NotBuilt(RuntimeServiceServicer):
    """Methods that answer UNIMPLEMENTED."""

    async def Exec(self, request: cri.ExecRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_STREAMING, remedy="crictl exec --sync and exec probes work")

    async def Attach(self, request: cri.AttachRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_STREAMING, remedy="the container's output is in its log")

    async def PortForward(self, request: cri.PortForwardRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_STREAMING, remedy="connect to the pod's address")

    async def CheckpointContainer(self, request: cri.CheckpointContainerRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)

    async def CheckpointPod(self, request: cri.CheckpointPodRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)

    async def RestorePod(self, request: cri.RestorePodRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)
