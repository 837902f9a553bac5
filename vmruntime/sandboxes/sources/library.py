"""The templates of this daemon: loaded when they are asked for, made in the background when there is none."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time

import structlog

from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import VmruntimeError
from vmruntime.hypervisor.interface import Hypervisor
from vmruntime.model.resources import VmSize
from vmruntime.sandboxes.sources.build import TemplateBuilder
from vmruntime.sandboxes.sources.files import TemplateFiles
from vmruntime.sandboxes.sources.pace import Pace
from vmruntime.sandboxes.sources.place import Place
from vmruntime.sandboxes.sources.template import Template, template_size

log = structlog.get_logger(__name__)

MOST = 4
"""Templates that are kept in memory; each takes about 40 MiB."""

MOST_FAILURES = 2
"""One guest may have been ended by somebody."""

RETRY_SECONDS = 300.0
NOTE_SECONDS = 24 * 3600.0
PLACEHOLDER = "0" * 64
FORMAT = 1
"""Changes with what a template is made of."""


class TemplateLibrary:
    """Finds the template for a VM."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        place: Place,
        files: TemplateFiles,
        builder: TemplateBuilder,
        pace: Pace,
        *,
        has_nic: bool,
    ) -> None:
        """Start with none; has_nic: guests have a NIC from the start."""
        self._tap = 0 if has_nic else None
        self._hypervisor = hypervisor
        self._place = place
        self._files = files
        self._builder = builder
        self._pace = pace
        self._loaded: dict[VmSize, Template] = {}
        self._making: set[VmSize] = set()
        self._failed: dict[VmSize, tuple[float, str, str]] = {}
        self._scope = TaskScope("templates")
        self._loading = asyncio.Lock()
        self._building = asyncio.Lock()
        self.changed = asyncio.Event()
        """Set, and replaced by another one, when a template has been made."""

    async def find(self, size: VmSize) -> tuple[Template | None, str]:
        """Return the template for a VM, or why there is none; one that is missing is made in the background.

        Raises:
            VmruntimeError: The guest cannot be looked at.
        """
        wanted = template_size(size)
        if wanted is None:
            return None, f"no template is made for a VM of {size.memory_mib} MiB"
        shape = await self.shape(wanted)
        if not shape:
            return None, "this hypervisor driver freezes no guests"
        async with self._loading:
            template = await self._current(wanted, shape)
        if template is not None:
            return template, ""
        when, failed_shape, why = self._failed.get(wanted, (0.0, "", ""))
        if failed_shape == shape and time.monotonic() - when < RETRY_SECONDS:
            return None, f"the template could not be made: {why}"
        self._make(wanted, shape)
        return None, "the template is being made"

    async def shape(self, size: VmSize) -> str:
        """Return what a template of this size depends on now; empty: there cannot be one."""
        spec = self._place.template(PLACEHOLDER, size, self._tap)
        shape = await self._hypervisor.shape(spec)
        whole = f"{FORMAT} {shape} {self._place.scratch_gib}"
        return hashlib.sha256(whole.encode()).hexdigest() if shape else ""

    async def failed(self, template: Template, why: str) -> None:
        """Note that a guest could not be brought back; a template with which that happens again is thrown away."""
        template.failures += 1
        async with self._loading:
            if template.failures >= MOST_FAILURES and self._loaded.get(template.size) is template:
                log.warning("template thrown away", why=why)
                del self._loaded[template.size]
                self._failed[template.size] = (time.monotonic(), template.shape, why)
                await in_thread(lambda: self._files.remove(template.shape))

    async def sweep(self) -> None:
        """Remove templates on the disk that are of no use any more."""
        keep = {template.shape for template in self._loaded.values()}
        try:
            await in_thread(lambda: self._files.sweep(keep))
        except OSError as error:
            log.warning("templates that are of no use any more cannot be looked for", why=str(error))

    def state(self) -> dict[str, str]:
        """Return what there is, by MiB, for people: ready, building or failed."""
        states = {size.memory_mib: "building" for size in self._making}
        states |= {size.memory_mib: f"failed: {why}" for size, (_, _, why) in self._failed.items()}
        states |= {size.memory_mib: "ready" for size in self._loaded}
        return {str(memory): states[memory] for memory in sorted(states)}

    async def close(self) -> None:
        """Stop making templates, and let go of those in memory."""
        await self._scope.close()
        self._loaded.clear()

    async def _current(self, size: VmSize, shape: str) -> Template | None:
        """Return the template in memory or on the disk, if it is not out of date."""
        template = self._loaded.get(size)
        if template is not None and template.shape != shape:
            log.info("the guest, QEMU or host has changed: template thrown away", memory_mib=size.memory_mib)
            del self._loaded[size]
            await in_thread(functools.partial(self._files.remove, template.shape))
            template = None
        if template is None:
            template = await in_thread(lambda: self._files.load(shape))
        if template is not None:
            self._keep(template)
            await self._note_use(template)
        return template

    async def _note_use(self, template: Template) -> None:
        """Note on the disk that a template is of use: not for each pod, since only days count there."""
        now = time.monotonic()
        if template.noted is None or now - template.noted > NOTE_SECONDS:
            template.noted = now
            await in_thread(lambda: self._files.note_use(template.shape))

    def _keep(self, template: Template) -> None:
        """Have a template in memory, as the one that was of use last; those that were not for the longest time go."""
        self._loaded.pop(template.size, None)
        self._loaded[template.size] = template
        self._failed.pop(template.size, None)
        while len(self._loaded) > MOST:
            del self._loaded[next(iter(self._loaded))]

    def _make(self, size: VmSize, shape: str) -> None:
        if size not in self._making:
            self._making.add(size)
            task = self._scope.start(self._made(size, shape), f"template of {size.memory_mib} MiB")
            task.add_done_callback(lambda _: self._making.discard(size))

    async def _made(self, size: VmSize, shape: str) -> None:
        async with self._building:
            await self._pace.quiet()
            try:
                template = await self._builder.build(shape, size)
            except (VmruntimeError, OSError) as error:
                log.warning(
                    "no template could be made: pods of this size boot", memory_mib=size.memory_mib, why=str(error)
                )
                self._failed[size] = (time.monotonic(), shape, str(error).partition("\n")[0])
                return
            self._keep(template)
        try:
            async with self._loading:
                if self._loaded.get(size) is template:  # else it was thrown away meanwhile
                    await in_thread(lambda: self._files.save(template))
        except OSError as error:
            log.warning("template not kept for later daemons", why=str(error))
        self.changed.set()
        self.changed = asyncio.Event()
