"""Resources of the host that vmruntime owns."""

from __future__ import annotations

import enum

import msgspec


class ResourceKind(enum.Enum):
    """What is owned. Each kind has one releaser, which a failed step, a stop and a restarted daemon share."""

    PROCESS = "process"
    NETWORK = "network"
    DIRECTORY = "directory"
    CGROUP = "cgroup"
    CID = "cid"
    SHARE = "share"
    MACHINE = "machine"
    SPARE = "spare"
    """Nothing by itself: its owner is a VM that is no pod's yet, and ends with the daemon."""


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """One owned resource, recorded before it is made and forgotten after it is released.

    Attributes:
        owner: Sandbox id, or "" for the daemon's own.
        kind: Says which releaser understands `data`.
        key: Unique for the kind: a pid, a path, a CID.
        data: What the releaser needs besides the key.
    """

    owner: str
    kind: ResourceKind
    key: str
    data: dict[str, str] = {}
