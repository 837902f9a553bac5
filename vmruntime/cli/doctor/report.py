"""What a check answers."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from vmruntime.cli.doctor.host import Host
from vmruntime.config.settings import Settings


class State(enum.Enum):
    """How a capability is here."""

    FOUND = "found"
    DEGRADED = "degraded"
    MISSING = "missing"


@dataclasses.dataclass(frozen=True)
class Capability:
    """One thing a host has or lacks.

    Attributes:
        why: What was found, or what is wrong.
        remedy: What to do about it; empty when nothing needs doing.
        essential: Pods cannot run without it.
    """

    name: str
    state: State
    why: str
    remedy: str = ""
    essential: bool = True

    @property
    def blocking(self) -> bool:
        """Whether pods cannot run because of it."""
        return self.essential and self.state is State.MISSING


Check = Callable[[Host, Settings], Capability]


def found(name: str, why: str) -> Capability:
    """Return a capability that is as it should be."""
    return Capability(name, State.FOUND, why)


def degraded(name: str, why: str, remedy: str) -> Capability:
    """Return a capability that works, but not as well as it could."""
    return Capability(name, State.DEGRADED, why, remedy, essential=False)


def missing(name: str, why: str, remedy: str, *, essential: bool = True) -> Capability:
    """Return a capability that is not there."""
    return Capability(name, State.MISSING, why, remedy, essential)
