"""CRI's calls on containers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from vmruntime.cri.lookup import full_id
from vmruntime.cri.streams import pieces
from vmruntime.cri.translate.checks import ARGUMENT_LIMIT, missing, number, texts
from vmruntime.cri.translate.container import (
    container_from_cri,
    container_info,
    container_item,
    container_status,
)
from vmruntime.cri.translate.filters import filter_containers
from vmruntime.cri.translate.resources import resources_from_cri
from vmruntime.cri.translate.stats import stats_to_cri
from vmruntime.errors import InvalidArgument
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer
from vmruntime.model.container import Container, ContainerState
from vmruntime.model.sandbox import SandboxKind
from vmruntime.pods.interface import Pods

# A year, in seconds; a longer grace period or exec time-out is a mistake, and some timers cannot hold it.
_LONGEST = 366 * 24 * 3600
# Both outputs must fit one answer of 16 MiB, which is all that kubelet and crictl accept.
_OUTPUT_BYTES = 16 * 1024 * 1024 - 4096


class ContainerCalls(RuntimeServiceServicer):
    """Container methods of the runtime service; the attributes are RuntimeService's."""

    _pods: Pods
    _supported: frozenset[SandboxKind]
    _writable_mountpoint: str

    async def CreateContainer(self, request: cri.CreateContainerRequest, context: Any) -> cri.CreateContainerResponse:
        """Prepare a container in a sandbox."""
        sandbox = self._pods.sandbox(
            full_id("pod_sandbox_id", request.pod_sandbox_id, lambda: (one.id for one in self._pods.sandboxes()))
        )
        spec = container_from_cri(request, sandbox.spec, supported=self._supported)
        return cri.CreateContainerResponse(container_id=await self._pods.create_container(sandbox.id, spec))

    async def StartContainer(self, request: cri.StartContainerRequest, context: Any) -> cri.StartContainerResponse:
        """Start a created container."""
        await self._pods.start_container(self._container_id(request.container_id))
        return cri.StartContainerResponse()

    async def StopContainer(self, request: cri.StopContainerRequest, context: Any) -> cri.StopContainerResponse:
        """Stop a container; one that is unknown or has exited is success."""
        timeout = number("timeout", request.timeout)
        await self._pods.stop_container(self._container_id(request.container_id), float(min(timeout, _LONGEST)))
        return cri.StopContainerResponse()

    async def RemoveContainer(self, request: cri.RemoveContainerRequest, context: Any) -> cri.RemoveContainerResponse:
        """Remove a container, running or not; an unknown one is success."""
        await self._pods.remove_container(self._container_id(request.container_id))
        return cri.RemoveContainerResponse()

    async def ListContainers(self, request: cri.ListContainersRequest, context: Any) -> cri.ListContainersResponse:
        """List containers, oldest first."""
        found = filter_containers(request.filter, self._pods.containers())
        return cri.ListContainersResponse(containers=[container_item(container) for container in found])

    async def StreamContainers(
        self, request: cri.StreamContainersRequest, context: Any
    ) -> AsyncIterator[cri.StreamContainersResponse]:
        """List containers in pieces."""
        found = filter_containers(request.filter, self._pods.containers())
        for piece in pieces(container_item(container) for container in found):
            yield cri.StreamContainersResponse(containers=piece)

    async def ContainerStatus(self, request: cri.ContainerStatusRequest, context: Any) -> cri.ContainerStatusResponse:
        """Return a container's status."""
        container = self._pods.container(self._container_id(request.container_id))
        return cri.ContainerStatusResponse(
            status=container_status(container), info=container_info(container) if request.verbose else None
        )

    async def UpdateContainerResources(
        self, request: cri.UpdateContainerResourcesRequest, context: Any
    ) -> cri.UpdateContainerResourcesResponse:
        """Change a container's limits; what is left out stays."""
        if request.HasField("windows"):
            raise InvalidArgument("windows: this runtime runs Linux containers")
        container_id = self._container_id(request.container_id)
        await self._pods.update_container(container_id, resources_from_cri("linux", request.linux))
        return cri.UpdateContainerResourcesResponse()

    async def ReopenContainerLog(
        self, request: cri.ReopenContainerLogRequest, context: Any
    ) -> cri.ReopenContainerLogResponse:
        """Open the log's path again after a rotation."""
        await self._pods.reopen_log(self._container_id(request.container_id))
        return cri.ReopenContainerLogResponse()

    async def ExecSync(self, request: cri.ExecSyncRequest, context: Any) -> cri.ExecSyncResponse:
        """Run a command and return what it said; time-out 0 is none."""
        container_id = self._container_id(request.container_id)
        argv = texts("cmd", request.cmd, limit=ARGUMENT_LIMIT)
        if not argv or not argv[0]:
            raise missing("cmd")
        timeout = number("timeout", request.timeout)
        result = await self._pods.exec_sync(container_id, argv, float(min(timeout, _LONGEST)))
        stdout, stderr = fit_output(result.stdout, result.stderr, _OUTPUT_BYTES)
        return cri.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=result.exit_code)

    async def ContainerStats(self, request: cri.ContainerStatsRequest, context: Any) -> cri.ContainerStatsResponse:
        """Return what a container uses."""
        container = self._pods.container(self._container_id(request.container_id))
        return cri.ContainerStatsResponse(stats=(await self._stats([container]))[0])

    async def ListContainerStats(
        self, request: cri.ListContainerStatsRequest, context: Any
    ) -> cri.ListContainerStatsResponse:
        """Return what running containers use."""
        return cri.ListContainerStatsResponse(stats=await self._stats(self._running(request.filter)))

    async def StreamContainerStats(
        self, request: cri.StreamContainerStatsRequest, context: Any
    ) -> AsyncIterator[cri.StreamContainerStatsResponse]:
        """Return what running containers use, in pieces."""
        for piece in pieces(await self._stats(self._running(request.filter))):
            yield cri.StreamContainerStatsResponse(container_stats=piece)

    def _running(self, message: cri.ContainerStatsFilter) -> list[Container]:
        found = filter_containers(message, self._pods.containers())
        return [container for container in found if container.state is ContainerState.RUNNING]

    async def _stats(self, containers: list[Container]) -> list[cri.ContainerStats]:
        running = [one.id for one in containers if one.state is ContainerState.RUNNING]
        usage = {one.id: one for one in await self._pods.usage(running)} if running else {}
        return [
            stats_to_cri(one, usage.get(one.id), writable_mountpoint=self._writable_mountpoint) for one in containers
        ]

    def _container_id(self, given: str) -> str:
        return full_id("container_id", given, lambda: (one.id for one in self._pods.containers()))


def fit_output(stdout: bytes, stderr: bytes, limit: int) -> tuple[bytes, bytes]:
    """Cut two outputs to `limit` bytes together; the shorter one is cut only beyond half of it."""
    keep = min(len(stdout), max(limit - len(stderr), limit // 2))
    return stdout[:keep], stderr[: limit - keep]
