"""CRI's calls that this version does not answer, each with what to use instead where there is something."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NoReturn

from vmruntime.errors import Unimplemented
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer

_STREAMING = "the streaming server for exec, attach and port-forward is not built in this version"
_POD_STATS = "statistics of whole pods are not built in this version"
_METRICS = "pod metrics over CRI are not built in this version"
_RESIZE = "resizing a running pod is not built in this version"
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

    async def UpdateContainerResources(self, request: cri.UpdateContainerResourcesRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_RESIZE, remedy="recreate the pod with the new limits")

    async def UpdatePodSandboxResources(self, request: cri.UpdatePodSandboxResourcesRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_RESIZE, remedy="recreate the pod with the new limits")

    async def PodSandboxStats(self, request: cri.PodSandboxStatsRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_POD_STATS, remedy="ContainerStats works")

    async def ListPodSandboxStats(self, request: cri.ListPodSandboxStatsRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_POD_STATS, remedy="ListContainerStats works")

    async def StreamPodSandboxStats(
        self, request: cri.StreamPodSandboxStatsRequest, context: Any
    ) -> AsyncIterator[cri.StreamPodSandboxStatsResponse]:
        """Not built."""
        raise Unimplemented(_POD_STATS, remedy="StreamContainerStats works")
        yield cri.StreamPodSandboxStatsResponse()  # never reached; makes it a stream

    async def ListMetricDescriptors(self, request: cri.ListMetricDescriptorsRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_METRICS)

    async def ListPodSandboxMetrics(self, request: cri.ListPodSandboxMetricsRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_METRICS)

    async def StreamPodSandboxMetrics(
        self, request: cri.StreamPodSandboxMetricsRequest, context: Any
    ) -> AsyncIterator[cri.StreamPodSandboxMetricsResponse]:
        """Not built."""
        raise Unimplemented(_METRICS)
        yield cri.StreamPodSandboxMetricsResponse()  # never reached; makes it a stream

    async def CheckpointContainer(self, request: cri.CheckpointContainerRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)

    async def CheckpointPod(self, request: cri.CheckpointPodRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)

    async def RestorePod(self, request: cri.RestorePodRequest, context: Any) -> NoReturn:
        """Not built."""
        raise Unimplemented(_CHECKPOINT)
