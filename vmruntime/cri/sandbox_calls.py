"""CRI's calls on pod sandboxes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from vmruntime.clock import Clock
from vmruntime.cri.lookup import full_id
from vmruntime.cri.streams import pieces
from vmruntime.cri.translate.container import container_status
from vmruntime.cri.translate.filters import filter_sandboxes
from vmruntime.cri.translate.resources import resources_from_cri
from vmruntime.cri.translate.sandbox import sandbox_from_cri, sandbox_info, sandbox_item, sandbox_status
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer
from vmruntime.model.sandbox import SandboxKind
from vmruntime.pods.interface import Pods


class SandboxCalls(RuntimeServiceServicer):
    """Sandbox methods of the runtime service; the attributes are RuntimeService's."""

    _pods: Pods
    _clock: Clock
    _default_kind: SandboxKind
    _supported: frozenset[SandboxKind]
    _privileged_on_host: bool

    async def RunPodSandbox(self, request: cri.RunPodSandboxRequest, context: Any) -> cri.RunPodSandboxResponse:
        """Start a sandbox; it is ready when this returns."""
        spec = sandbox_from_cri(
            request,
            default_kind=self._default_kind,
            supported=self._supported,
            privileged_on_host=self._privileged_on_host,
        )
        return cri.RunPodSandboxResponse(pod_sandbox_id=await self._pods.run_sandbox(spec))

    async def StopPodSandbox(self, request: cri.StopPodSandboxRequest, context: Any) -> cri.StopPodSandboxResponse:
        """Stop a sandbox; one that is unknown or stopped is success."""
        await self._pods.stop_sandbox(self._sandbox_id(request.pod_sandbox_id))
        return cri.StopPodSandboxResponse()

    async def RemovePodSandbox(
        self, request: cri.RemovePodSandboxRequest, context: Any
    ) -> cri.RemovePodSandboxResponse:
        """Remove a sandbox with its containers; an unknown one is success."""
        await self._pods.remove_sandbox(self._sandbox_id(request.pod_sandbox_id))
        return cri.RemovePodSandboxResponse()

    async def PodSandboxStatus(
        self, request: cri.PodSandboxStatusRequest, context: Any
    ) -> cri.PodSandboxStatusResponse:
        """Return a sandbox's status with its containers'; the time of the picture lets kubelet order it with events.

        A verbose status also has the network checked.
        """
        sandbox_id = self._sandbox_id(request.pod_sandbox_id)
        network = await self._pods.check_network(sandbox_id) if request.verbose else ""
        # Both answers come from memory with no await between them, so they belong to the same moment.
        now = self._clock.now_ns()
        sandbox = self._pods.sandbox(sandbox_id)
        containers = [one for one in self._pods.containers() if one.sandbox_id == sandbox.id]
        containers.sort(key=lambda container: (container.created_at, container.id))
        return cri.PodSandboxStatusResponse(
            status=sandbox_status(sandbox),
            info=sandbox_info(sandbox, network, self._pods.facts(sandbox.id)) if request.verbose else None,
            containers_statuses=[container_status(container) for container in containers],
            timestamp=now,
        )

    async def ListPodSandbox(self, request: cri.ListPodSandboxRequest, context: Any) -> cri.ListPodSandboxResponse:
        """List sandboxes, oldest first."""
        found = filter_sandboxes(request.filter, self._pods.sandboxes())
        return cri.ListPodSandboxResponse(items=[sandbox_item(sandbox) for sandbox in found])

    async def StreamPodSandboxes(
        self, request: cri.StreamPodSandboxesRequest, context: Any
    ) -> AsyncIterator[cri.StreamPodSandboxesResponse]:
        """List sandboxes in pieces."""
        found = filter_sandboxes(request.filter, self._pods.sandboxes())
        for piece in pieces(sandbox_item(sandbox) for sandbox in found):
            yield cri.StreamPodSandboxesResponse(pod_sandboxes=piece)

    async def UpdatePodSandboxResources(
        self, request: cri.UpdatePodSandboxResourcesRequest, context: Any
    ) -> cri.UpdatePodSandboxResourcesResponse:
        """Change what a pod may have in all."""
        await self._pods.update_sandbox(
            self._sandbox_id(request.pod_sandbox_id),
            resources_from_cri("overhead", request.overhead) if request.HasField("overhead") else None,
            resources_from_cri("resources", request.resources) if request.HasField("resources") else None,
        )
        return cri.UpdatePodSandboxResourcesResponse()

    def _sandbox_id(self, given: str) -> str:
        return full_id("pod_sandbox_id", given, lambda: (one.id for one in self._pods.sandboxes()))
