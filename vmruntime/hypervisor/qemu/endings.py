"""How a VM ends, and how often it boots again, as its monitor tells."""

from __future__ import annotations

import asyncio
import contextlib

from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import VmEnd
from vmruntime.hypervisor.qmp.monitor import Monitor

PANIC = "guest-panic"
REASONS = {
    "guest-shutdown": (VmEnd.POWEROFF, "the guest powered off"),
    "guest-reset": (VmEnd.CRASH, "the guest's kernel panicked or asked for a reboot"),
    PANIC: (VmEnd.CRASH, "the guest's kernel panicked"),
    "host-signal": (VmEnd.KILLED, "QEMU was ended by a signal on the host"),
    "host-qmp-quit": (VmEnd.KILLED, "the VM was ended by the host"),
}
"""Of the event SHUTDOWN (qemu-qmp-ref(7), ShutdownCause)."""

RUN_STATES = {
    "shutdown": (VmEnd.POWEROFF, "the guest powered off"),
    "guest-panicked": (VmEnd.CRASH, "the guest's kernel panicked"),
    "internal-error": (VmEnd.LOST, "QEMU could not go on with the guest: internal error"),
}
"""States (RunState) that a VM stays in when its guest has ended and QEMU has not."""


RESET_SECONDS = 2.0
"""One reboot is several resets: a kernel asks in one way after the other, and SeaBIOS may ask again."""


class Endings:
    """What a VM's monitor has told.

    Attributes:
        end: How it ended; None: not told.
        reason: Why, in one sentence.
        over: The guest has ended, and QEMU holds it still.
        reboots: How often it has booted again.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.end: VmEnd | None = None
        self.reason = ""
        self.over = asyncio.Event()
        self.reboots = 0
        self._monitor = monitor
        self._last_reset = 0.0
        self._expected = 0

    async def listen(self) -> None:
        """Note what happens, until the connection ends."""
        async for event in self._monitor.events("SHUTDOWN", "GUEST_PANICKED", "RESET", "STOP"):
            data = event.get("data")
            reason = str(data.get("reason", "")) if isinstance(data, dict) else ""
            match event["event"]:
                case "RESET":
                    self._note_reset(event["timestamp"])
                case "SHUTDOWN":
                    self._note(*REASONS.get(reason, (None, "")))
                case "GUEST_PANICKED":
                    self._note(*REASONS[PANIC])
            if event["event"] != "RESET":
                # Some of these end QEMU at once.
                with contextlib.suppress(HypervisorError):
                    await self.look()

    async def look(self) -> None:
        """Find out whether the guest has ended already.

        Raises:
            HypervisorError: The monitor does not answer.
        """
        status = await self._monitor.execute("query-status")
        if (found := RUN_STATES.get(str(status.get("status")))) is not None:
            self._note(*found)
            self.over.set()

    def expect_reset(self) -> None:
        """Take the next reset for a part of the start."""
        self._expected += 1

    def _note_reset(self, timestamp: dict[str, int]) -> None:
        if self._expected:
            self._expected -= 1
            return
        when = timestamp["seconds"] + timestamp["microseconds"] / 1e6
        if when - self._last_reset > RESET_SECONDS:
            self.reboots += 1
        self._last_reset = when

    def _note(self, end: VmEnd | None, reason: str) -> None:
        if self.end is None and end is not None:
            self.end, self.reason = end, reason
