"""One running domain."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from typing import Any

from vmruntime.aio.detached import DetachedProcess
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.interface import Disk, VmEnd, VmHandle
from vmruntime.hypervisor.libvirt import domains
from vmruntime.hypervisor.libvirt.binding import libvirt
from vmruntime.hypervisor.libvirt.connection import RECONNECTED, Connection, Event
from vmruntime.hypervisor.libvirt.domain import BALLOON
from vmruntime.hypervisor.libvirt.ending import LOST, Ending, told_by_libvirt
from vmruntime.hypervisor.libvirt.monitor import Monitor
from vmruntime.hypervisor.qmp.vm import QmpVm

AFTERMATH = 5.0
"""Seconds that libvirt has to find out that a QEMU has ended."""
POLL_SECONDS = 0.1
JUST_BACK = 15.0
"""Seconds in which libvirt, back again, ends what has ended meanwhile."""

DESTROY_TIMEOUT = 60.0
LIBVIRTS = re.compile(r"libvirt-\d+-.*")
"""What libvirt calls the descriptors that it passes on."""


class LibvirtVm(QmpVm):
    """A VM of the libvirt driver.

    Args:
        handle: What adopt() takes.
        uuid: The domain's.
        connection: libvirt's.
        helpers: Processes that serve the VM.
        serials: Of the disks that are a part of the domain; the others are plugged in by QMP.
    """

    def __init__(
        self, handle: VmHandle, uuid: str, connection: Connection, helpers: list[DetachedProcess], serials: set[str]
    ) -> None:
        self.monitor = Monitor(connection, uuid)
        super().__init__(handle, DetachedProcess(handle.process), helpers, self.monitor, balloon=BALLOON)
        self._uuid = uuid
        self._connection = connection
        self._serials = serials
        self._listening = contextlib.ExitStack()

    async def open(self) -> None:
        """Get to know the VM, and again after each time that libvirt was away."""
        self._listening.enter_context(self._connection.listening(self._uuid, self._listen))
        await super().open()

    async def close(self) -> None:
        """Let go of the VM without ending it."""
        self._listening.close()
        await super().close()

    async def attached_disks(self) -> set[str]:
        """Return the serials of the disks the VM has: those of the domain, and those plugged in later."""
        labels = await super().attached_disks()
        return {label for label in labels if not LIBVIRTS.fullmatch(label)} | self._serials

    async def attach_disk(self, disk: Disk) -> None:
        """Hot-plug a disk."""
        if disk.serial in self._serials:
            raise HypervisorError(f"a disk with the serial {disk.serial} is there already")
        await super().attach_disk(disk)

    async def attach_boot_disk(self, disk: Disk) -> None:
        """Plug in the disk to boot from, before the guest runs for the first time."""
        await self._devices.attach_disk(disk, bootindex=1)
        # QEMU makes the firmware's list anew at a reset. SeaBIOS starts no disk that is not in there.
        self._endings.expect_reset()
        await self._monitor.execute("system_reset")

    async def detach_disk(self, serial: str) -> None:
        """Unplug a disk that was plugged in; unknown serial: success."""
        if serial in self._serials:
            raise HypervisorError(f"the disk {serial} is a part of the machine")
        await super().detach_disk(serial)

    async def resume(self) -> None:
        """Let the guest run; it runs already: success."""
        await self._ask("resume", lambda domain: domain.resume(), unless=libvirt.VIR_DOMAIN_RUNNING)

    async def pause(self) -> None:
        """Hold the guest's processors; they are held already: success."""
        await self._ask("pause", lambda domain: domain.suspend(), unless=libvirt.VIR_DOMAIN_PAUSED)

    async def press_power_button(self) -> None:
        """Send an ACPI power-button event."""
        flags = libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN
        await self._ask("power button", lambda domain: domain.shutdownFlags(flags))

    async def reset(self) -> None:
        """Reset the machine."""
        await self._ask("reset", lambda domain: domain.reset())

    async def _ask(self, what: str, action: Callable[[libvirt.virDomain], Any], *, unless: int | None = None) -> None:
        """Do something to the domain, unless it is in that state."""

        def act(connection: libvirt.virConnect) -> None:
            domain = domains.find(connection, self._uuid)
            if domain is None or not domain.isActive():
                raise VmGone("the VM does not run any more")
            if domain.state()[0] != unless:
                action(domain)

        try:
            await self._connection.call(act, what=what)
        except libvirt.libvirtError as error:
            if not self._process.alive:
                raise VmGone(f"the VM is gone: {error}") from error
            raise HypervisorError(f"libvirt refused {what}: {error}") from error

    async def _end_qemu(self) -> None:
        """End the domain and let libvirt forget it and its end; without libvirt the process alone is killed."""

        def remove(connection: libvirt.virConnect) -> None:
            domain = domains.find(connection, self._uuid)
            if domain is not None:
                domains.end(domain)

        with contextlib.suppress(HypervisorError, libvirt.libvirtError):
            await self._connection.call(remove, what="kill", timeout=DESTROY_TIMEOUT, patience=0.0)

    async def _how(self, status: int | None) -> tuple[VmEnd, str]:
        """Do not take libvirt's own signal for the cause.

        A guest that powered off while libvirt was away is found by it as it comes back, and then QEMU is ended by a signal;
        what it said of the guest before is lost.
        """
        end, why = await super()._how(status)
        just_back = asyncio.get_running_loop().time() - self._connection.since < JUST_BACK
        if end is VmEnd.KILLED and just_back and not self._killed:
            remembered = await self._unannounced(status)
            if remembered[0] is VmEnd.POWEROFF:
                return remembered
        return end, why

    async def _unannounced(self, status: int | None) -> tuple[VmEnd, str]:
        """Ask libvirt; it has no process of its own that QEMU is a child of, so nobody has a status."""
        if self._killed:
            return VmEnd.KILLED, "the VM was ended by the host"
        try:
            async with asyncio.timeout(AFTERMATH):
                ending = await self._remembered()
        except TimeoutError:
            ending = LOST
        return ending.end, ending.why

    async def _remembered(self) -> Ending:
        """Return the end that libvirt remembers, once it has noticed it."""
        while True:
            try:
                state = await self._connection.call(lambda c: domains.state_of(c, self._uuid), what="end of the VM")
            except (HypervisorError, libvirt.libvirtError):
                return LOST
            if state is None:
                return LOST
            if (ending := told_by_libvirt(*state)) is not None:
                return ending
            await asyncio.sleep(POLL_SECONDS)

    def _listen(self, event: Event) -> None:
        if event.name == RECONNECTED:
            self._scope.start(self._look(), "look")

    async def _look(self) -> None:
        """Learn of a panic that nobody listened to."""
        with contextlib.suppress(HypervisorError):
            await self._endings.look()


class EndedVm(LibvirtVm):
    """A VM that ended before anybody listened, as libvirt remembers it."""

    def __init__(
        self, handle: VmHandle, uuid: str, connection: Connection, helpers: list[DetachedProcess], ending: Ending
    ) -> None:
        super().__init__(handle, uuid, connection, helpers, set())
        self._ending = ending

    async def _unannounced(self, status: int | None) -> tuple[VmEnd, str]:
        return self._ending.end, self._ending.why
