"""How many examples hypothesis makes up, where each takes long.

Few in each of the many runs of everything, which all have other ones; after a change of what they are about, more:
VMRUNTIME_EXAMPLES=10 makes ten times as many.
"""

from __future__ import annotations

import os

_FACTOR = float(os.environ.get("VMRUNTIME_EXAMPLES", "1"))


def examples(number: int) -> int:
    """Return `number`, or as many times that as was asked for."""
    return max(1, round(number * _FACTOR))
