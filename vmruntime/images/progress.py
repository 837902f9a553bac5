"""How far a pull is."""

from __future__ import annotations

import enum
from collections.abc import Callable

import msgspec


class Phase(enum.Enum):
    """What a pull is doing; it only moves forwards."""

    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    UNPACKING = "unpacking"
    DONE = "done"


class PullProgress(msgspec.Struct, frozen=True, kw_only=True):
    """A pull at one moment.

    Attributes:
        reference: The normalised reference.
        done, total: Compressed bytes of the layers that had to be fetched; total is 0 while resolving.
        layers_done, layers_total: Layers ready on disk, including those that were there before.
    """

    reference: str
    phase: Phase
    done: int = 0
    total: int = 0
    layers_done: int = 0
    layers_total: int = 0


Report = Callable[[PullProgress], None]
