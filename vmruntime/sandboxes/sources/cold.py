"""A guest that boots."""

from __future__ import annotations

import time

from vmruntime import tracing
from vmruntime.hypervisor.interface import Hypervisor
from vmruntime.model.resources import VmSize
from vmruntime.network.tap import SpareTap
from vmruntime.sandboxes.placement import recorder
from vmruntime.sandboxes.sources.guest import READY_LINE, Guest, reach
from vmruntime.sandboxes.sources.place import FIRST_NIC, Place


class ColdSource:
    """Boots guests."""

    def __init__(self, hypervisor: Hypervisor, place: Place, boot_timeout: float) -> None:
        self._hypervisor = hypervisor
        self._place = place
        self._boot_timeout = boot_timeout

    async def guest(self, owner: str, size: VmSize, cgroup: str, tap: SpareTap | None) -> Guest:
        """Boot a guest and wait for its agent; what was made for it stays in the ledger when that fails.

        Raises:
            BootFailed: The guest did not come up; the message has the end of its console.
            FailedPrecondition: There is no guest to boot.
        """
        began = time.monotonic()
        with tracing.span("vm.prepare"):
            spec = await self._place.pod(owner, size)
            await self._place.make(owner, cgroup)
        prepared = time.monotonic()
        with tracing.span("vm.qemu"):
            vm = await self._hypervisor.start(spec, recorder(self._place.owned, owner))
        phases = {"prepare": (prepared - began) * 1000, "qemu": (time.monotonic() - prepared) * 1000}
        with tracing.span("vm.agent"):
            guest = await reach(vm, READY_LINE, self._boot_timeout, phases, "cold")
        if tap is not None:
            try:
                with tracing.span("vm.nic"):
                    await guest.vm.attach_nic(FIRST_NIC, tap.fd)
            except BaseException:
                await guest.close()
                raise
        return guest
