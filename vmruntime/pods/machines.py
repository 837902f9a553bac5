"""What can be done to the machine of an image pod, and CRI has no call for: pause, resume, reset."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import structlog

from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.interface import VirtualMachine
from vmruntime.model.sandbox import SandboxKind
from vmruntime.pods.context import Context

log = structlog.get_logger(__name__)


class Machine(Protocol):
    """A machine that comes and goes while its sandbox runs."""

    @property
    def vm(self) -> VirtualMachine | None:
        """The VM while it runs."""


@runtime_checkable
class MachineSandbox(Protocol):
    """A running sandbox that has a machine: an image pod's."""

    @property
    def machine(self) -> Machine:
        """The pod's machine."""


class MachineControl:
    """Implements cri.ports.Machines."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def pause(self, sandbox_id: str) -> None:
        """Hold the machine's processors. Its pod stays ready: nobody but who did this can tell it from a busy guest."""
        await self._vm(sandbox_id).pause()
        log.info("machine paused", sandbox=sandbox_id)

    async def resume(self, sandbox_id: str) -> None:
        """Let the machine's processors go on."""
        await self._vm(sandbox_id).resume()
        log.info("machine resumed", sandbox=sandbox_id)

    async def reset(self, sandbox_id: str) -> None:
        """Have the machine boot again; its container goes on."""
        await self._vm(sandbox_id).reset()
        log.info("machine reset", sandbox=sandbox_id)

    def _vm(self, sandbox_id: str) -> VirtualMachine:
        """Return the VM of a pod.

        Raises:
            NotFound: There is no such pod.
            FailedPrecondition: It is of another kind, or its VM does not run.
        """
        sandbox = self._context.registry.sandbox(sandbox_id)
        if sandbox.spec.kind is not SandboxKind.IMAGE:
            raise FailedPrecondition(
                f"the sandbox {sandbox_id} is of the kind {sandbox.spec.kind.value}, and only image pods are machines"
            )
        running = self._context.running(sandbox_id).running
        vm = running.machine.vm if isinstance(running, MachineSandbox) else None
        if vm is None:
            raise FailedPrecondition(f"the VM of the sandbox {sandbox_id} does not run")
        return vm
