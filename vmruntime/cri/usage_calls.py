"""CRI's calls on what whole pods use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from vmruntime.cri.lookup import full_id
from vmruntime.cri.streams import pieces
from vmruntime.cri.translate.filters import filter_sandboxes
from vmruntime.cri.translate.metrics import descriptors, pod_metrics
from vmruntime.cri.translate.pod_stats import pod_stats_to_cri
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer
from vmruntime.model.container import Container
from vmruntime.model.sandbox import Sandbox, SandboxState
from vmruntime.pods.interface import Pods


class UsageCalls(RuntimeServiceServicer):
    """Statistics and metrics of pods; the attributes are RuntimeService's."""

    _pods: Pods
    _writable_mountpoint: str

    async def PodSandboxStats(self, request: cri.PodSandboxStatsRequest, context: Any) -> cri.PodSandboxStatsResponse:
        """Return what a pod uses."""
        ids = [one.id for one in self._pods.sandboxes()]
        sandbox = self._pods.sandbox(full_id("pod_sandbox_id", request.pod_sandbox_id, lambda: iter(ids)))
        return cri.PodSandboxStatsResponse(stats=(await self._pod_stats([sandbox]))[0])

    async def ListPodSandboxStats(
        self, request: cri.ListPodSandboxStatsRequest, context: Any
    ) -> cri.ListPodSandboxStatsResponse:
        """Return what ready pods use."""
        return cri.ListPodSandboxStatsResponse(stats=await self._pod_stats(self._ready(request.filter)))

    async def StreamPodSandboxStats(
        self, request: cri.StreamPodSandboxStatsRequest, context: Any
    ) -> AsyncIterator[cri.StreamPodSandboxStatsResponse]:
        """Return what ready pods use, in pieces."""
        for piece in pieces(await self._pod_stats(self._ready(request.filter))):
            yield cri.StreamPodSandboxStatsResponse(pod_sandbox_stats=piece)

    async def ListMetricDescriptors(
        self, request: cri.ListMetricDescriptorsRequest, context: Any
    ) -> cri.ListMetricDescriptorsResponse:
        """Say which metrics there are."""
        return cri.ListMetricDescriptorsResponse(descriptors=descriptors())

    async def ListPodSandboxMetrics(
        self, request: cri.ListPodSandboxMetricsRequest, context: Any
    ) -> cri.ListPodSandboxMetricsResponse:
        """Return the metrics of ready pods."""
        return cri.ListPodSandboxMetricsResponse(pod_metrics=await self._metrics())

    async def StreamPodSandboxMetrics(
        self, request: cri.StreamPodSandboxMetricsRequest, context: Any
    ) -> AsyncIterator[cri.StreamPodSandboxMetricsResponse]:
        """Return the metrics of ready pods, in pieces."""
        for piece in pieces(await self._metrics()):
            yield cri.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=piece)

    def _ready(self, message: cri.PodSandboxStatsFilter) -> list[Sandbox]:
        alike = cri.PodSandboxFilter(id=message.id, label_selector=message.label_selector)
        found = filter_sandboxes(alike, self._pods.sandboxes())
        return [sandbox for sandbox in found if sandbox.state is SandboxState.READY]

    async def _pod_stats(self, sandboxes: list[Sandbox]) -> list[cri.PodSandboxStats]:
        ready = [one.id for one in sandboxes if one.state is SandboxState.READY]
        usage = {one.id: one for one in await self._pods.sandbox_usage(ready)}
        containers = self._containers()
        return [
            pod_stats_to_cri(
                one,
                containers.get(one.id, []),
                usage.get(one.id),
                writable_mountpoint=self._writable_mountpoint,
            )
            for one in sandboxes
        ]

    async def _metrics(self) -> list[cri.PodSandboxMetrics]:
        ready = {one.id: one for one in self._ready(cri.PodSandboxStatsFilter())}
        usage = await self._pods.sandbox_usage(list(ready))
        containers = self._containers()
        return [pod_metrics(ready[one.id], containers.get(one.id, []), one) for one in usage]

    def _containers(self) -> dict[str, list[Container]]:
        found: dict[str, list[Container]] = {}
        for container in self._pods.containers():
            found.setdefault(container.sandbox_id, []).append(container)
        return found
