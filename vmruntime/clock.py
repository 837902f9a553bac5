"""Time, injected so that tests can own it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where the daemon reads time."""

    def now_ns(self) -> int:
        """Return nanoseconds since the Unix epoch."""

    def monotonic(self) -> float:
        """Return seconds of a clock that never goes back."""


class SystemClock:
    """The host's clocks."""

    def now_ns(self) -> int:
        """Return nanoseconds since the Unix epoch (CLOCK_REALTIME)."""
        return time.time_ns()

    def monotonic(self) -> float:
        """Return seconds since an arbitrary start (CLOCK_MONOTONIC)."""
        return time.monotonic()
