"""VMs that wait for pods: brought back from a template, reached, with a NIC and a writable disk.

A VM that waits has the id that its pod will have, so whatever belongs to it is the pod's from the start; what marks it as
nobody's yet is one line in the ledger (Spares). It ends with the daemon: the next one makes its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Awaitable, Callable

import structlog

from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import VmruntimeError
from vmruntime.model.resources import VmSize
from vmruntime.network.tap import SpareTap
from vmruntime.sandboxes import scratch
from vmruntime.sandboxes.sources.budget import ENOUGH, LOW, memory_available
from vmruntime.sandboxes.sources.guest import Guest
from vmruntime.sandboxes.sources.library import TemplateLibrary
from vmruntime.sandboxes.sources.pace import Pace
from vmruntime.sandboxes.sources.spares import Spares
from vmruntime.sandboxes.sources.template import Template, TemplateSource, template_size

log = structlog.get_logger(__name__)

LOOK_SECONDS = 5.0
"""How often it is looked whether the host still has memory for VMs that wait."""

RETRY_SECONDS = 30.0
ENTROPY_BYTES = 64


@dataclasses.dataclass
class WarmVm:
    """A VM that waits, or that a pod has claimed and not taken yet.

    Attributes:
        ended: Why it does not run any more; empty: it does.
    """

    id: str
    guest: Guest
    tap: SpareTap
    template: Template
    ended: str = ""
    watching: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Let go of it; what it owns is in the ledger."""
        if self.watching is not None:
            self.watching.cancel()
        await self.guest.close()
        await in_thread(self.tap.close)


class WarmPool:
    """Keeps a number of VMs waiting, in the background."""

    def __init__(
        self,
        most: int,
        usual: VmSize,
        *,
        library: TemplateLibrary,
        source: TemplateSource,
        spares: Spares,
        pace: Pace,
        new_id: Callable[[], str],
        new_tap: Callable[[], Awaitable[SpareTap]],
        rehearsal: bytes,
    ) -> None:
        """Start with none.

        Args:
            most: How many are to wait.
            usual: What pods are without limits; once others were asked for, these are made.
            library: Has the templates.
            source: Brings guests back.
            spares: Marks what is no pod's yet, and releases it.
            pace: Says when pods are being started.
            new_id: Makes ids of sandboxes.
            new_tap: Makes taps.
            rehearsal: The configuration of a container as most are; see Agent.prepare().
        """
        self._most = most
        self._wanted = template_size(usual)
        self._library = library
        self._source = source
        self._spares = spares
        self._pace = pace
        self._new_id = new_id
        self._new_tap = new_tap
        self._rehearsal = rehearsal
        self._waiting: dict[str, WarmVm] = {}
        self._claimed: dict[str, WarmVm] = {}
        self._scope = TaskScope("warm vms")
        self._look = asyncio.Event()
        self._short = False

    def open(self) -> None:
        """Begin to make VMs."""
        if self._most:
            self._scope.start(self._keep(), "pool")

    @property
    def waiting(self) -> int:
        """How many VMs wait."""
        return len(self._waiting)

    def claim(self, size: VmSize) -> str | None:
        """Return the id of a VM that a pod of this size is to have, and keep it for that pod; None: none waits."""
        wanted = template_size(size)
        if wanted is None or not self._most:
            return None
        self._wanted = wanted
        self._look.set()
        for vm in self._waiting.values():
            if vm.template.size == wanted:
                self._claimed[vm.id] = self._waiting.pop(vm.id)
                return vm.id
        return None

    def claimed(self, owner: str) -> WarmVm | None:
        """Return the VM that was claimed under an id; None: none was, or it has ended."""
        return self._claimed.get(owner)

    def take(self, owner: str) -> WarmVm | None:
        """Hand over the VM that was claimed under an id, which may have ended since: it is the caller's now."""
        vm = self._claimed.pop(owner, None)
        if vm is not None and vm.watching is not None:
            vm.watching.cancel()
        return vm

    async def drop(self, owner: str) -> None:
        """Let go of a claimed VM whose pod does not come, before what it owns is released; there is none: success."""
        if (vm := self._claimed.pop(owner, None)) is not None:
            await vm.close()

    async def close(self) -> None:
        """End every VM that waits."""
        await self._scope.close()
        left = [*self._waiting.values(), *self._claimed.values()]
        self._waiting.clear()
        self._claimed.clear()
        for vm in left:
            await self._end(vm)

    async def _keep(self) -> None:
        """Make VMs while there are too few, and end those that there is no room for."""
        while True:
            self._look.clear()
            pause = LOOK_SECONDS
            try:
                if self._has_memory():
                    await self._drop_others()
                    if len(self._waiting) < self._most and not await self._add():
                        pause = RETRY_SECONDS
                    elif len(self._waiting) < self._most:
                        continue
                else:
                    await self._drop_all("the host is short of memory")
            except VmruntimeError as error:
                log.warning("no VM can be kept waiting", why=str(error))
                pause = RETRY_SECONDS
            except Exception:  # whatever it is: those that wait have still to be ended when the host is short of memory
                log.exception("no VM can be kept waiting")
                pause = RETRY_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._look.wait()

    def _has_memory(self) -> bool:
        share = memory_available()
        self._short = share < (ENOUGH if self._short else LOW)
        return not self._short

    async def _drop_others(self) -> None:
        """Make room for what is asked for now, and end what was made of a template that is out of date."""
        shapes: dict[VmSize, str] = {}
        for vm in list(self._waiting.values()):
            size = vm.template.size
            if size not in shapes:
                shapes[size] = await self._library.shape(size)
            stale = vm.template.shape != shapes[size]
            crowded = size != self._wanted and len(self._waiting) >= self._most
            if (stale or crowded) and self._waiting.pop(vm.id, None) is not None:
                await self._end(vm)

    async def _drop_all(self, why: str) -> None:
        if self._waiting:
            log.info("ending VMs that wait for pods", count=len(self._waiting), why=why)
        while self._waiting:
            await self._end(self._waiting.popitem()[1])

    async def _add(self) -> bool:
        """Add one VM; False: there is no template for it yet."""
        await self._pace.quiet()
        if self._wanted is None:
            return False
        # Listened for before the question: it may be made in between.
        changed = self._library.changed
        template, _ = await self._library.find(self._wanted)
        if template is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS):
                    await changed.wait()
                    return True
            return False
        vm = await self._made(template)
        self._waiting[vm.id] = vm
        vm.watching = self._scope.start(self._watch(vm), f"end of {vm.id[:13]}")
        log.debug("a VM waits for its pod", sandbox=vm.id, memory_mib=template.size.memory_mib)
        return True

    async def _made(self, template: Template) -> WarmVm:
        owner = self._new_id()
        tap = await self._new_tap()
        try:
            cgroup = await self._spares.record(owner)
            guest = await self._source.guest(template, owner, cgroup, tap, low=True)
            try:
                await guest.agent.prepare(os.urandom(ENTROPY_BYTES), scratch.SERIAL, self._rehearsal)
            except BaseException:
                await guest.close()
                raise
        except BaseException:
            await in_thread(tap.close)  # it may be the last one, for which the kernel takes its time
            await asyncio.shield(self._spares.release(owner))
            raise
        return WarmVm(owner, guest, tap, template)

    async def _watch(self, vm: WarmVm) -> None:
        """Notice a VM that ends while it waits."""
        vm.ended = await vm.guest.vm.wait()
        vm.watching = None
        if self._waiting.pop(vm.id, None) is not None:
            log.warning("a VM that waited for its pod has ended", sandbox=vm.id, why=vm.ended)
            await self._end(vm)
            self._look.set()

    async def _end(self, vm: WarmVm) -> None:
        await vm.close()
        await self._spares.release(vm.id)
