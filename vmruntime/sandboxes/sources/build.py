"""Makes a template: boots a guest with nothing plugged in, and freezes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

import msgspec
import structlog

from vmruntime.aio import memfile
from vmruntime.aio.pipeline import in_thread
from vmruntime.hypervisor.interface import GuestMemory, Hypervisor
from vmruntime.model.resources import VmSize
from vmruntime.sandboxes.placement import recorder
from vmruntime.sandboxes.sources.guest import READY_LINE, unless_it_ends
from vmruntime.sandboxes.sources.place import Place
from vmruntime.sandboxes.sources.spares import Spares
from vmruntime.sandboxes.sources.template import MIB, Template

log = structlog.get_logger(__name__)

SETTLE_SECONDS = 0.2
"""After which a guest that has just come up does nothing any more."""


class TemplateBuilder:
    """Makes templates."""

    def __init__(
        self, hypervisor: Hypervisor, place: Place, spares: Spares, new_id: Callable[[], str], boot_timeout: float
    ) -> None:
        self._hypervisor = hypervisor
        self._place = place
        self._spares = spares
        self._new_id = new_id
        self._boot_timeout = boot_timeout

    async def build(self, shape: str, size: VmSize) -> Template:
        """Boot and freeze a guest; nothing of its VM stays.

        Raises:
            VmruntimeError: It cannot be booted or frozen.
        """
        began = time.monotonic()
        owner = self._new_id()
        cgroup = await self._spares.record(owner)
        try:
            template = await self._frozen(shape, size, owner, cgroup)
        finally:
            await asyncio.shield(self._place.owned.release(owner))
        log.info(
            "template made",
            memory_mib=size.memory_mib,
            takes_mib=template.memory_bytes // MIB,
            milliseconds=round((time.monotonic() - began) * 1000),
        )
        return template

    async def _frozen(self, shape: str, size: VmSize, owner: str, cgroup: str) -> Template:
        spec = await self._place.make_bare(owner, size, cgroup, low=True)
        with contextlib.ExitStack() as descriptors:
            memory = memfile.make("template", size.memory_mib * MIB)
            descriptors.callback(os.close, memory)
            spec = msgspec.structs.replace(spec, memory=GuestMemory(fd=memory))
            vm = await self._hypervisor.start(spec, recorder(self._place.owned, owner))
            try:
                await unless_it_ends(vm, lambda: vm.wait_for_console(READY_LINE), self._boot_timeout)
                await asyncio.sleep(SETTLE_SECONDS)
                state = await vm.freeze()
            finally:
                await asyncio.shield(vm.kill())
            await in_thread(lambda: _settle(memory))
            descriptors.pop_all()
        return Template(shape, size, memory, state)


def _settle(memory: int) -> None:
    memfile.drop_zeros(memory)
    memfile.seal(memory)
