"""CRI's calls on the runtime as a whole: version, condition, configuration, events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal

import structlog

from vmruntime import __version__
from vmruntime.cri.ports import Conditions, NodeNetwork
from vmruntime.cri.translate.events import event_to_cri
from vmruntime.cri.translate.pod_cidrs import pod_cidrs_from_cri
from vmruntime.errors import Unavailable
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated.cri_pb2_grpc import RuntimeServiceServicer
from vmruntime.model.sandbox import SandboxKind
from vmruntime.pods.interface import Pods

log = structlog.get_logger(__name__)

# The version of kubelet's own API, which never left 0.1.0 and which every runtime repeats.
_KUBELET_API_VERSION = "0.1.0"


class NodeCalls(RuntimeServiceServicer):
    """Node methods of the runtime service; the attributes are RuntimeService's."""

    _pods: Pods
    _conditions: Conditions
    _node_network: NodeNetwork
    _default_kind: SandboxKind
    _supported: frozenset[SandboxKind]
    _cgroup_driver: Literal["cgroupfs", "systemd"]
    _watchers: set[asyncio.Task[Any]]
    _closed: bool

    async def Version(self, request: cri.VersionRequest, context: Any) -> cri.VersionResponse:
        """Say who answers."""
        return cri.VersionResponse(
            version=_KUBELET_API_VERSION,
            runtime_name="vmruntime",
            runtime_version=__version__,
            runtime_api_version="v1",
        )

    async def Status(self, request: cri.StatusRequest, context: Any) -> cri.StatusResponse:
        """Return the two conditions kubelet needs, the handlers a RuntimeClass may name, and the features."""
        runtime = await self._conditions.runtime_ready()
        network = await self._conditions.network_ready()
        handlers = sorted(kind.value for kind in self._supported)
        if self._default_kind in self._supported:
            handlers.insert(0, "")
        return cri.StatusResponse(
            status=cri.RuntimeStatus(
                conditions=[_condition("RuntimeReady", runtime), _condition("NetworkReady", network)]
            ),
            info=self._conditions.info() if request.verbose else None,
            runtime_handlers=[
                cri.RuntimeHandler(
                    name=name,
                    features=cri.RuntimeHandlerFeatures(
                        recursive_read_only_mounts=True,
                        user_namespaces=self._conditions.user_namespaces(
                            SandboxKind(name) if name else self._default_kind
                        ),
                    ),
                )
                for name in handlers
            ],
            features=cri.RuntimeFeatures(
                supplemental_groups_policy=True, user_namespaces_host_network=False, mount_options=True
            ),
        )

    async def RuntimeConfig(self, request: cri.RuntimeConfigRequest, context: Any) -> cri.RuntimeConfigResponse:
        """Tell kubelet the cgroup driver."""
        driver = cri.SYSTEMD if self._cgroup_driver == "systemd" else cri.CGROUPFS
        return cri.RuntimeConfigResponse(linux=cri.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def UpdateRuntimeConfig(
        self, request: cri.UpdateRuntimeConfigRequest, context: Any
    ) -> cri.UpdateRuntimeConfigResponse:
        """Take the node's pod CIDRs; a configuration without any changes nothing."""
        cidrs = pod_cidrs_from_cri(request.runtime_config.network_config.pod_cidr)
        if cidrs:
            await self._node_network.use_pod_cidrs(cidrs)
        return cri.UpdateRuntimeConfigResponse()

    async def GetContainerEvents(
        self, request: cri.GetEventsRequest, context: Any
    ) -> AsyncIterator[cri.ContainerEventResponse]:
        """Send changes from now on, until the client goes or the daemon stops."""
        if self._closed:
            raise Unavailable("the daemon is stopping")
        task = asyncio.current_task()
        assert task is not None  # gRPC runs every call in a task of its own
        self._watchers.add(task)
        try:
            events = self._pods.events()
            try:
                async for event in events:
                    yield event_to_cri(event)
            finally:
                # The queue behind it goes now, not when the garbage collector comes by.
                if isinstance(events, AsyncGenerator):
                    await events.aclose()
        except asyncio.CancelledError:
            if not self._closed:
                raise
            # close() did it, not the client: say so, and let kubelet come back.
            task.uncancel()
            raise Unavailable("the daemon is stopping") from None
        finally:
            self._watchers.discard(task)


def _condition(kind: str, state: tuple[bool, str, str]) -> cri.RuntimeCondition:
    ready, reason, message = state
    return cri.RuntimeCondition(type=kind, status=ready, reason=reason, message=message)
