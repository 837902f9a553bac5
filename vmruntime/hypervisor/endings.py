"""How a hypervisor's process ended, when nothing else is known."""

from __future__ import annotations

import signal

from vmruntime.hypervisor.interface import VmEnd

ON_PURPOSE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
"""Signals that somebody sent; the others are a defect's."""


def end_by_status(status: int | None) -> VmEnd:
    """Tell an end by an exit status as of subprocess; None: nobody knows it."""
    return VmEnd.KILLED if status is not None and -status in ON_PURPOSE else VmEnd.LOST
