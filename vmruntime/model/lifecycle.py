"""The steps a sandbox and a container may take, as tables.

    sandbox     CREATING ──► READY ──► NOTREADY ──► REMOVING ──► (gone)
                    └──────────────────────┴───────────▲

    container   CREATING ──► CREATED ──► RUNNING ──► EXITED ──► REMOVING ──► (gone)
                    │            └──────────┴── UNKNOWN ──┘         ▲
                    └───────────────────────────────────────────────┘

CREATING, REMOVING and UNKNOWN are what a daemon finds after it was killed in the middle of something.
"""

from __future__ import annotations

from vmruntime.errors import FailedPrecondition
from vmruntime.model.container import ContainerState as C
from vmruntime.model.sandbox import SandboxState as S

SANDBOX_STEPS: dict[S, frozenset[S]] = {
    S.CREATING: frozenset({S.READY, S.NOTREADY, S.REMOVING}),
    S.READY: frozenset({S.NOTREADY, S.REMOVING}),
    S.NOTREADY: frozenset({S.REMOVING}),
    S.REMOVING: frozenset(),
}

CONTAINER_STEPS: dict[C, frozenset[C]] = {
    C.CREATING: frozenset({C.CREATED, C.EXITED, C.REMOVING}),
    C.CREATED: frozenset({C.RUNNING, C.EXITED, C.UNKNOWN, C.REMOVING}),
    C.RUNNING: frozenset({C.EXITED, C.UNKNOWN, C.REMOVING}),
    C.UNKNOWN: frozenset({C.RUNNING, C.EXITED, C.REMOVING}),
    C.EXITED: frozenset({C.REMOVING}),
    C.REMOVING: frozenset(),
}


def check_sandbox_step(before: S, after: S) -> None:
    """Raise FailedPrecondition unless a sandbox may go from one state to the other."""
    if after != before and after not in SANDBOX_STEPS[before]:
        raise FailedPrecondition(f"a sandbox that is {before.value} cannot become {after.value}")


def check_container_step(before: C, after: C) -> None:
    """Raise FailedPrecondition unless a container may go from one state to the other."""
    if after != before and after not in CONTAINER_STEPS[before]:
        raise FailedPrecondition(f"a container that is {before.value} cannot become {after.value}")
