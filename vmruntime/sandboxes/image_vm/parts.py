"""What machines of image pods are made with."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from vmruntime.aio.inotify import FileChanges
from vmruntime.clock import Clock
from vmruntime.config.settings import Settings
from vmruntime.hypervisor.interface import Hypervisor
from vmruntime.model.sandbox import Sandbox
from vmruntime.paths import Paths
from vmruntime.sandboxes.ledger import OwnedResources


class Tap(Protocol):
    """An open tap."""

    @property
    def fd(self) -> int:
        """Its descriptor."""

    def close(self) -> None:
        """Close our descriptor."""


@dataclasses.dataclass(frozen=True)
class MachineParts:
    """What machines are made with.

    Attributes:
        hypervisors: By name, as handles have it; a machine keeps to the one that it was started with.
        driver: The name of the one that machines are started with.
        changes: Tells when consoles' files grow.
        open_taps: Opens the taps of a pod, one for each of its interfaces.
    """

    hypervisors: Mapping[str, Hypervisor]
    driver: str
    owned: OwnedResources
    paths: Paths
    settings: Settings
    clock: Clock
    changes: FileChanges
    open_taps: Callable[[Sandbox], Awaitable[Sequence[Tap]]]
