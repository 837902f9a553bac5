"""What of a daemon is something else in tests and benchmarks. No configuration leads here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from vmruntime.hypervisor.interface import Accelerator, Hypervisor, VsockTransport
from vmruntime.network.tap import SpareTap
from vmruntime.pods.ports import Network
from vmruntime.sandboxes.cgroup import HostCgroups


class Driver(Hypervisor, Protocol):
    """A hypervisor that says how it runs guests."""

    @property
    def accelerator(self) -> Accelerator:
        """How guest instructions run."""

    @property
    def transport(self) -> VsockTransport:
        """How the host reaches guests."""


class PodNetworks(Network, Protocol):
    """Pod networks that say whether they work."""

    async def spare_tap(self) -> SpareTap:
        """Make a tap that is no pod's yet."""

    async def ready(self) -> tuple[bool, str]:
        """Return whether pods can get an address, and why not."""

    async def use_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Take addresses of pods from these networks, where the network is vmruntime's to configure."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Stand-ins; None: the real part, as the settings have it."""

    hypervisor: Driver | None = None
    network: PodNetworks | None = None
    cgroups: HostCgroups | None = None
