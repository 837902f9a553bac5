"""Makes a template: boots a guest that has all that every pod's guest has, but a vsock, and freezes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from vmruntime.aio import memfile
from vmruntime.aio.pipeline import in_thread
from vmruntime.hypervisor.interface import GuestMemory, Hypervisor
from vmruntime.model.resources import VmSize
from vmruntime.network.tap import SpareTap
from vmruntime.sandboxes.placement import recorder
from vmruntime.sandboxes.sources.guest import READY_LINE, unless_it_ends
from vmruntime.sandboxes.sources.place import Place
from vmruntime.sandboxes.sources.spares import Spares
from vmruntime.sandboxes.sources.template import MIB, Template

log = structlog.get_logger(__name__)

GIB = 1024**3
SETTLE_SECONDS = 0.2
"""After which a guest that has just come up does nothing any more."""


class TemplateBuilder:
    """Makes templates."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        place: Place,
        spares: Spares,
        new_id: Callable[[], str],
        new_tap: Callable[[], Awaitable[SpareTap]] | None,
        boot_timeout: float,
    ) -> None:
        """Take what VMs are made with; see GuestSources."""
        self._new_tap = new_tap
        self._hypervisor = hypervisor
        self._place = place
        self._spares = spares
        self._new_id = new_id
        self._boot_timeout = boot_timeout

    async def build(self, shape: str, size: VmSize) -> Template:
        """Boot and freeze a guest; nothing else of its VM stays.

        Raises:
            VmruntimeError: It cannot be booted or frozen.
        """
        began = time.monotonic()
        owner = self._new_id()
        cgroup = await self._spares.record(owner)
        try:
            template = await self._frozen(shape, size, owner, cgroup)
        finally:
            await asyncio.shield(self._spares.release(owner))
        log.info(
            "template made",
            memory_mib=size.memory_mib,
            takes_mib=template.memory_bytes // MIB,
            milliseconds=round((time.monotonic() - began) * 1000),
        )
        return template

    async def _frozen(self, shape: str, size: VmSize, owner: str, cgroup: str) -> Template:
        await self._place.make(owner, cgroup, low=True)
        async with contextlib.AsyncExitStack() as descriptors:
            kept = descriptors.enter_context(contextlib.ExitStack())
            tap = None
            if self._new_tap is not None:
                tap = await self._new_tap()
                descriptors.push_async_callback(in_thread, tap.close)  # the kernel takes its time
            spec = self._place.template(owner, size, None if tap is None else tap.fd)
            memory = memfile.make("template", size.memory_mib * MIB)
            kept.callback(os.close, memory)
            disk = memfile.make("scratch", self._place.scratch_gib * GIB)
            kept.callback(os.close, disk)
            spec = msgspec.structs.replace(spec, memory=GuestMemory(fd=memory))
            vm = await self._hypervisor.start(spec, recorder(self._place.owned, owner))
            try:
                await unless_it_ends(vm, lambda: vm.wait_for_console(READY_LINE), self._boot_timeout)
                await asyncio.sleep(SETTLE_SECONDS)
                state = await vm.freeze()
            finally:
                await asyncio.shield(vm.kill())
            await in_thread(lambda: _settle(memory, spec.disks[0].path, disk))
            kept.pop_all()
        return Template(shape, size, memory, disk, state)


def _settle(memory: int, scratch: Path, disk: int) -> None:
    """Take the disk as the guest has left it, and let nobody change it or the memory any more."""
    with scratch.open("rb") as file:
        memfile.copy(file.fileno(), disk)
    for fd in (memory, disk):
        memfile.drop_zeros(fd)
        memfile.seal(fd)
