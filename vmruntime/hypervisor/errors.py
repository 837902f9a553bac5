"""Failures of virtual machines."""

from __future__ import annotations

from vmruntime.errors import Code, VmruntimeError


class HypervisorError(VmruntimeError):
    """Raised when the hypervisor could not do what was asked; the message has its own words."""

    code = Code.INTERNAL


class VmGone(HypervisorError):
    """Raised when the VM does not run any more."""

    code = Code.FAILED_PRECONDITION


class BootFailed(HypervisorError):
    """Raised when a guest did not come up; the message ends with what its console said last."""

    code = Code.UNAVAILABLE
