"""CRI's calls that this version does not answer, each with what to use instead where there is something."""

from __future__ import annotations

from typing import Any, NoReturn

from vmruntime.errors import Unimplemented
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer

_CHECKPOINT = "checkpoint and restore are not built"


class NotBuilt(RuntimeServiceServicer):
    """Methods that answer UNIMPLEMENTED."""

    async def CheckpointContainer(self, request: cri.CheckpointContainerRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)

    async def CheckpointPod(self, request: cri.CheckpointPodRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)

    async def RestorePod(self, request: cri.RestorePodRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)
