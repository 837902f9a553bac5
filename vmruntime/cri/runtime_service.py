"""CRI's RuntimeService: it checks and translates, and leaves the doing to pods."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from vmruntime.clock import Clock
from vmruntime.cri.container_calls import ContainerCalls
from vmruntime.cri.node_calls import NodeCalls
from vmruntime.cri.not_built import NotBuilt
from vmruntime.cri.ports import Conditions, NodeNetwork, Streams
from vmruntime.cri.sandbox_calls import SandboxCalls
from vmruntime.cri.streaming_calls import StreamingCalls
from vmruntime.cri.usage_calls import UsageCalls
from vmruntime.model.sandbox import SandboxKind
from vmruntime.pods.interface import Pods


class RuntimeService(SandboxCalls, ContainerCalls, StreamingCalls, UsageCalls, NodeCalls, NotBuilt):
    """Every method of runtime.v1.RuntimeService, grouped by what it is about."""

    def __init__(
        self,
        pods: Pods,
        conditions: Conditions,
        clock: Clock,
        streams: Streams,
        node_network: NodeNetwork,
        *,
        default_kind: SandboxKind,
        supported: frozenset[SandboxKind],
        cgroup_driver: Literal["cgroupfs", "systemd"],
        writable_mountpoint: str,
        privileged_on_host: bool = False,
    ) -> None:
        """Make the service.

        Args:
            pods: The use cases.
            conditions: Whether the runtime and its network are ready.
            clock: Dates the answers of PodSandboxStatus.
            streams: Gives out the URLs of Exec, Attach and PortForward.
            node_network: Is told the node's pod CIDRs.
            default_kind: What boots for a pod that does not say (Settings.default_kind).
            supported: Kinds of pods that can run; without HOST, the host's namespaces are refused.
            cgroup_driver: Told to kubelet (Settings.cgroup_driver).
            privileged_on_host: Whether privileged pods run on the host (Settings.host_pods).
            writable_mountpoint: Directory that holds the pods' disks, reported with statistics.
        """
        self._pods = pods
        self._conditions = conditions
        self._clock = clock
        self._streams = streams
        self._node_network = node_network
        self._default_kind = default_kind
        self._supported = supported
        self._cgroup_driver = cgroup_driver
        self._privileged_on_host = privileged_on_host
        self._writable_mountpoint = writable_mountpoint
        self._watchers: set[asyncio.Task[Any]] = set()
        self._closed = False

    def close(self) -> None:
        """End the event streams, which would otherwise keep the server from stopping."""
        self._closed = True
        for task in self._watchers:
            task.cancel()
