"""Failures of virtual machines."""

from __future__ import annotations

from vmruntime.errors import Code, VmruntimeError


class HypervisorError(VmruntimeError):
    """Raised when the hypervisor could not do what was asked; the message has its own words."""

    code = Code.INTERNAL


class VmGone(HypervisorError):
    """Raised when the VM does not run any more."""

    code = Code.FAILED_PRECONDITION


class VmHeld(HypervisorError):
    """Raised when the VM runs and its guest does not, for the time being; `why` is VirtualMachine.held."""

    code = Code.UNAVAILABLE

    def __init__(self, why: str) -> None:
        super().__init__(f"the pod's VM is held: {why}", remedy="free space there; the VM then goes on where it was")
        self.why = why


class BootFailed(HypervisorError):
    """Raised when a guest did not come up; the message ends with what its console said last."""

    code = Code.UNAVAILABLE
