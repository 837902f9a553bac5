"""Which source a pod's guest comes from: a warm VM, else a template, else a cold boot."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import structlog

from vmruntime.config.settings import Settings
from vmruntime.errors import ResourceExhausted, VmruntimeError
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import Hypervisor
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import VmSize
from vmruntime.network.tap import SpareTap
from vmruntime.paths import Paths
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.sandboxes.sources.budget import warm_vms
from vmruntime.sandboxes.sources.build import TemplateBuilder
from vmruntime.sandboxes.sources.cold import ColdSource
from vmruntime.sandboxes.sources.files import TemplateFiles
from vmruntime.sandboxes.sources.guest import Guest
from vmruntime.sandboxes.sources.library import TemplateLibrary
from vmruntime.sandboxes.sources.pace import Pace
from vmruntime.sandboxes.sources.place import Place
from vmruntime.sandboxes.sources.spares import Spares
from vmruntime.sandboxes.sources.template import TemplateSource
from vmruntime.sandboxes.sources.warm import WarmPool, WarmVm

log = structlog.get_logger(__name__)

RESTORE_SECONDS = 20.0
"""What a guest that comes back may take: it is a tenth of a second, and one that does not come is better booted soon."""

ANSWER_SECONDS = 3.0
"""What a warm VM's agent may take to answer."""

STARTS_PER_PROCESSOR = 4
"""More at once would not be up sooner, and a node that starts all its pods would run each of them into boot_timeout."""


class GuestSources:
    """Gives pods their guests."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        owned: OwnedResources,
        paths: Paths,
        settings: Settings,
        host_memory_mib: int,
        usual: VmSize,
        *,
        new_id: Callable[[], str],
        new_tap: Callable[[], Awaitable[SpareTap]] | None,
        rehearsal: bytes,
        can_share_memory: bool,
    ) -> None:
        """Start nothing yet.

        Args:
            hypervisor: The driver.
            owned: The ledger.
            paths: Where files are.
            settings: The configuration.
            host_memory_mib: Of the host.
            usual: The size of pods without limits.
            new_id: Makes ids of sandboxes.
            new_tap: Makes taps for NICs that are plugged in before a pod's network is known; None: they are plugged in later.
            rehearsal: The configuration of a container as most are, which VMs that wait for pods run once.
            can_share_memory: VMs need no helper process for what every pod has, so that they can share a template's memory.
        """
        boot_timeout = settings.hypervisor.boot_timeout
        self._owned = owned
        self._new_tap = new_tap
        self._can_share_memory = can_share_memory
        self._templates = settings.start.source != "cold"
        place = Place(owned, paths, settings)
        spares = Spares(owned, settings.cgroup_parent)
        self._spares = spares
        self._pace = Pace()
        self._turn = asyncio.Semaphore(STARTS_PER_PROCESSOR * (os.cpu_count() or 1))
        self._cold = ColdSource(hypervisor, place, boot_timeout)
        patience = min(boot_timeout, RESTORE_SECONDS)
        self._source = TemplateSource(hypervisor, place, patience, mergeable=settings.hypervisor.ksm)
        builder = TemplateBuilder(hypervisor, place, spares, new_id, new_tap, boot_timeout)
        files = TemplateFiles(paths.templates)
        self._library = TemplateLibrary(hypervisor, place, files, builder, self._pace, has_nic=new_tap is not None)
        warm = settings.start.source == "auto" and new_tap is not None
        self._usual = usual
        self._pool = WarmPool(
            warm_vms(settings.start.warm, host_memory_mib) if warm else 0,
            usual,
            library=self._library,
            source=self._source,
            spares=spares,
            pace=self._pace,
            new_id=new_id,
            new_tap=new_tap or _no_tap,
            rehearsal=rehearsal,
        )

    async def open(self) -> None:
        """Begin to make what pods will need, in the background."""
        if self._templates:
            try:
                await self._library.find(self._usual)
            except VmruntimeError as error:
                log.warning("no template yet", why=str(error))
            await self._library.sweep()
            self._pool.open()

    async def close(self) -> None:
        """End what waits for pods."""
        await self._pool.close()
        await self._library.close()

    def state(self) -> dict[str, object]:
        """Return what there is, for people."""
        return {"templates": self._library.state(), "warm": self._pool.waiting}

    def claim(self, size: VmSize) -> str | None:
        """Return the id of a warm VM for a pod of this size; None: none waits."""
        return self._pool.claim(size)

    async def drop(self, owner: str) -> None:
        """Let go of what was claimed for a pod that did not come to it."""
        await self._pool.drop(owner)

    async def tap(self, owner: str) -> SpareTap | None:
        """Return the tap that a pod's first NIC is on, or will be, the caller's to close; None: it is given one later."""
        claimed = self._pool.claimed(owner)
        if claimed is not None:
            return claimed.tap
        return None if self._new_tap is None else await self._new_tap()

    async def guest(self, owner: str, size: VmSize, cgroup: str, tap: SpareTap | None, *, shares: bool = True) -> Guest:
        """Return a guest for a pod, at least so large as its template: the caller lets it grow.

        Args:
            owner: The sandbox's id.
            size: What the pod needs.
            cgroup: Where it runs.
            tap: What tap() returned.
            shares: The pod may mount files of the host.

        Raises:
            BootFailed: No guest comes up.
        """
        with self._pace.start():
            warm = self._pool.take(owner)
            if warm is not None and (guest := await self._warm(warm, cgroup)) is not None:
                return guest
            async with self._turn:
                guest = await self._restored(owner, size, cgroup, tap, shares=shares) if self._templates else None
                return guest or await self._cold.guest(owner, size, cgroup, tap)

    async def boot(self, owner: str, size: VmSize, cgroup: str, tap: SpareTap | None) -> Guest:
        """Return a guest that boots, in place of one that is of no use and was let go of; see guest()."""
        with self._pace.start():
            async with self._turn:
                await self._start_again(owner)
                return await self._cold.guest(owner, size, cgroup, tap)

    async def _warm(self, vm: WarmVm, cgroup: str) -> Guest | None:
        """Make a warm VM a pod's; None: it is of no use, and gone."""
        try:
            if vm.ended:
                raise HypervisorError(vm.ended)
            if vm.template.shape != await self._library.shape(vm.template.size):
                raise HypervisorError("its template is out of date")
            await self._spares.hand_over(vm.id, cgroup)
            async with asyncio.timeout(ANSWER_SECONDS):
                await vm.guest.agent.hello()
        except (VmruntimeError, TimeoutError) as error:
            log.warning("a warm VM is of no use", sandbox=vm.id, why=str(error) or "its agent does not answer")
            await vm.guest.close()
            await self._start_again(vm.id)
            return None
        except BaseException:
            await vm.guest.close()
            raise
        vm.guest.source = "warm"
        vm.guest.phases.clear()
        return vm.guest

    async def _restored(
        self, owner: str, size: VmSize, cgroup: str, tap: SpareTap | None, *, shares: bool
    ) -> Guest | None:
        """Bring a guest back from a template; None: it has to boot, for a reason that is logged."""
        template, why = await self._library.find(size)
        if template is None:
            log.info("the guest boots", sandbox=owner, why=why)
            return None
        private = self._can_share_memory and not shares
        try:
            guest = await self._source.guest(template, owner, cgroup, tap, private=private)
        except ResourceExhausted:  # a boot would fail as well, and the template is not to blame
            raise
        except (VmruntimeError, OSError) as error:
            log.warning("the guest boots: it cannot be brought back from its template", sandbox=owner, why=str(error))
            await self._library.failed(template, str(error).partition("\n")[0])
            await self._start_again(owner)
            return None
        template.failures = 0
        return guest

    async def _start_again(self, owner: str) -> None:
        """Release what a failed attempt has made, but for the pod's network."""
        await self._owned.release(owner, keep=frozenset({ResourceKind.NETWORK}))


async def _no_tap() -> SpareTap:
    raise HypervisorError("there is nothing that makes taps")
