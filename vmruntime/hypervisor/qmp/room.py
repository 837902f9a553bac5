"""Guests that QEMU holds because the host has no room for what they write, and that go on once it has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.qmp.monitor import Monitor

log = structlog.get_logger(__name__)

RETRY_SECONDS = 2.0
HELD = "io-error"
"""The run state (qemu-qmp-ref(7), RunState) in which QEMU keeps a write that met a full disk, to try it again."""


class RoomWatch:
    """Lets a held guest go on as soon as its write succeeds.

    A write of a guest to a full file system is no error for the guest: it would take its disk for broken. QEMU stops the
    guest's processors instead, and there they would stay.

    Attributes:
        held: Why the guest does not run, in one sentence; empty: it is not held.
    """

    def __init__(
        self,
        name: str,
        monitor: Monitor,
        resume: Callable[[], Awaitable[None]],
        resumed: Callable[[], Awaitable[None]],
    ) -> None:
        """Do nothing yet.

        Args:
            name: The VM's, for the log.
            monitor: Open.
            resume: Lets the guest run.
            resumed: Awaited when it does.
        """
        self.held = ""
        self._name = name
        self._monitor = monitor
        self._resume = resume
        self._resumed = resumed

    async def look(self) -> None:
        """Find out whether the guest is held already.

        Raises:
            VmGone: There is no QEMU any more.
        """
        if not self.held and await self._is_held():
            self.held = "the host has no room for what the pod writes to its disk"
            log.warning("vm is held until the host has room for its disk", vm=self._name)

    async def watch(self) -> None:
        """Help the guest on whenever it is held, until the monitor's connection ends."""
        try:
            await self._help()
            async for event in self._monitor.events("BLOCK_IO_ERROR"):
                data = event.get("data")
                if isinstance(data, dict) and data.get("action") == "stop":
                    await self._help()
        except VmGone:
            return

    async def _help(self) -> None:
        while await self._is_held():
            await self.look()
            await asyncio.sleep(RETRY_SECONDS)
            try:
                await self._resume()
            except VmGone:
                raise
            except HypervisorError as error:
                log.warning("vm could not be resumed", vm=self._name, error=str(error))
            # A write that fails again stops the guest within milliseconds.
            await asyncio.sleep(RETRY_SECONDS / 4)
        if self.held:
            self.held = ""
            log.info("vm goes on: the host has room for its disk", vm=self._name)
            await self._resumed()

    async def _is_held(self) -> bool:
        try:
            status = await self._monitor.execute("query-status")
        except VmGone:
            raise
        except HypervisorError:
            return bool(self.held)  # busy; what was known stands
        return bool(status.get("status") == HELD)
