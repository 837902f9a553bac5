"""The one place that loads libvirt's library."""

from __future__ import annotations

import os


def _quiet(_context: None, _error: object) -> None:
    """Take libvirt's errors from its exceptions alone; by default it prints them, too."""


# The driver inside the process logs on its own, by default to the daemon's standard error; it looks here when it is loaded.
_OUTPUTS = "LIBVIRT_LOG_OUTPUTS"
_given = os.environ.get(_OUTPUTS)
os.environ.setdefault(_OUTPUTS, "3:syslog:vmruntime-libvirt")
try:
    import libvirt
    import libvirt_qemu
finally:
    if _given is None:
        del os.environ[_OUTPUTS]

libvirt.registerErrorHandler(_quiet, None)

LEAST_VERSION = 9_000_000
"""Descriptors for disks (virDomainFDAssociate) came with libvirt 9.0."""


def readable(version: int) -> str:
    """Return a version as people write it: 9000000 is 9.0.0."""
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"


__all__ = ["LEAST_VERSION", "libvirt", "libvirt_qemu", "readable"]
