"""A template: a guest that was booted once and frozen, and is brought back for each pod."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Awaitable, Callable

import msgspec

from vmruntime import tracing
from vmruntime.agent.interface import AgentHello
from vmruntime.aio import memfile
from vmruntime.aio.beside import together
from vmruntime.aio.pipeline import in_thread
from vmruntime.hypervisor.interface import GuestMemory, Hypervisor, VirtualMachine
from vmruntime.hypervisor.vsock import Plugged
from vmruntime.model.resources import VmSize
from vmruntime.network.tap import SpareTap
from vmruntime.sandboxes.placement import recorder
from vmruntime.sandboxes.sources.guest import CONNECTED_LINE, Guest, reach, unless_it_ends
from vmruntime.sandboxes.sources.place import Place, plugged_nic

MIB = 1024 * 1024
SMALLEST_MIB, LARGEST_MIB = 128, 4096
MOST_GROWTH = 4
"""A guest cannot use memory that is plugged in for its kernel's own, so there must not be much more of it than of the other."""


class Template:
    """A frozen guest in memory that nobody can change any more (a sealed memfd): not by cutting or removing a file either.

    Attributes:
        shape: What it depends on; see Hypervisor.shape().
        size: Of the VMs that are made of it.
        state: What VirtualMachine.freeze() returned.
        failures: How many guests in a row could not be brought back.
        noted: When its use was last noted on the disk, by the monotonic clock; None: not by this daemon.
        hello: What the agent of its first guest said, which is what all of them say; None: there was none yet.
    """

    def __init__(self, shape: str, size: VmSize, memory: int, scratch: int, state: bytes) -> None:
        """Take sealed memfds, which are closed when nobody has the template any more: a restore may be under way."""
        self.shape = shape
        self.size = size
        self.state = state
        self.failures = 0
        self.noted: float | None = None
        self.hello: AgentHello | None = None
        self._memory = memory
        self._scratch = scratch
        for fd in (memory, scratch):
            weakref.finalize(self, os.close, fd)

    @property
    def memory_bytes(self) -> int:
        """What it takes of the host's memory."""
        return os.fstat(self._memory).st_blocks * 512

    def memory(self) -> int:
        """Return another descriptor of its memory, the caller's to close."""
        return os.dup(self._memory)

    def scratch(self) -> int:
        """Return another descriptor of its writable disk, which is mounted in the guest; the caller's to close."""
        return os.dup(self._scratch)


def template_size(size: VmSize) -> VmSize | None:
    """Return the size of the template for a VM, which then grows; None: no template suits it.

    One processor, and the largest power of two that is no more memory than the VM's.
    """
    memory_mib = min(LARGEST_MIB, 1 << (size.memory_mib.bit_length() - 1))
    if memory_mib < SMALLEST_MIB or size.memory_mib > MOST_GROWTH * memory_mib:
        return None
    if size.memory_mib > memory_mib and size.max_memory_mib < size.memory_mib:
        return None
    return msgspec.structs.replace(size, vcpus=1, memory_mib=memory_mib)


class TemplateSource:
    """Brings guests back from templates."""

    def __init__(self, hypervisor: Hypervisor, place: Place, timeout: float, *, mergeable: bool = False) -> None:
        """Take what VMs are made with.

        Args:
            hypervisor: The driver.
            place: Where they get their directories.
            timeout: Seconds that a guest may take to answer.
            mergeable: Of memory that is shared until it is written: see GuestMemory.
        """
        self._mergeable = mergeable
        self._hypervisor = hypervisor
        self._place = place
        self._timeout = timeout

    async def guest(
        self,
        template: Template,
        owner: str,
        cgroup: str,
        tap: SpareTap | None,
        *,
        private: bool = False,
        low: bool = False,
    ) -> Guest:
        """Bring a guest back and wait for its agent; what was made for it stays in the ledger when that fails.

        Args:
            template: Of which.
            owner: In the ledger.
            cgroup: Where it is to run.
            tap: Its first NIC is on it.
            private: It shares the template's memory until it writes (GuestMemory.private).
            low: No pod waits for it.

        Raises:
            HypervisorError: It cannot be brought back.
        """
        began = time.monotonic()
        with contextlib.ExitStack() as descriptors:
            with tracing.span("vm.prepare"):
                scratch = template.scratch()
                descriptors.callback(os.close, scratch)
                spec = await self._place.pod(owner, template.size)
                await self._place.make(owner, cgroup, low=low, like=scratch)
            prepared = time.monotonic()
            memory = template.memory()
            descriptors.callback(os.close, memory)
            given = memory
            if not private:
                given = memfile.make(f"guest-{owner[:13]}", template.size.memory_mib * MIB)
                descriptors.callback(os.close, given)
            described = GuestMemory(fd=given, private=private, mergeable=private and self._mergeable)
            nic = plugged_nic(None if tap is None else tap.fd)
            spec = msgspec.structs.replace(spec, memory=described, nic=nic, frozen=True)
            started: list[VirtualMachine] = []

            async def start() -> None:
                with tracing.span("vm.qemu"):
                    started.append(await self._hypervisor.start(spec, recorder(self._place.owned, owner)))

            async def fill() -> None:
                with tracing.span("vm.memory"):
                    await in_thread(lambda: memfile.copy(memory, given))

            try:
                await together(start(), *(() if private else (fill(),)))
            except BaseException:
                for vm in started:
                    await vm.close()
                raise
        vm = started[0]
        ran = time.monotonic()
        phases = {"prepare": (prepared - began) * 1000, "qemu": (ran - prepared) * 1000}
        usable = await self._thaw(vm, template)
        phases["thaw"] = (time.monotonic() - ran) * 1000
        with tracing.span("vm.agent"):
            guest = await reach(vm, CONNECTED_LINE, self._timeout, phases, "template", usable, template.hello)
        template.hello = guest.hello
        return guest

    async def _thaw(self, vm: VirtualMachine, template: Template) -> Callable[[], Awaitable[None]]:
        """Let the guest go on, and return what waits until its vsock can be used; the VM is let go of when that fails."""
        try:
            with tracing.span("vm.thaw"):
                await unless_it_ends(vm, lambda: vm.thaw(template.state), self._timeout)
            usable = Plugged(vm.handle.helpers[0].pid).usable if vm.handle.vsock else _at_once
            with tracing.span("vm.resume"):
                await vm.resume()
            return usable
        except BaseException:
            await vm.close()
            raise


async def _at_once() -> None:
    return
