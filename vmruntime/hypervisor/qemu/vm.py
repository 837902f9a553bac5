"""One running QEMU that the daemon started by itself."""

from __future__ import annotations

import contextlib
import dataclasses

from vmruntime.aio.detached import DetachedProcess
from vmruntime.hypervisor.endings import end_by_status
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import VmEnd, VmHandle
from vmruntime.hypervisor.qemu import freeze
from vmruntime.hypervisor.qemu.aio import THREADS
from vmruntime.hypervisor.qemu.monitor import Monitor
from vmruntime.hypervisor.qmp.vm import QmpVm
from vmruntime.hypervisor.vsock import tail_of


@dataclasses.dataclass
class Waiting:
    """The vsock that a VM gets when its frozen guest is brought back.

    Attributes:
        vsock: /dev/vhost-vsock, or a connection to vhost-device-vsock; None: no vsock.
        closing: Closes it.
    """

    vsock: int | None
    native: bool
    closing: contextlib.ExitStack


class QemuVm(QmpVm):
    """A VM of the QEMU driver.

    Args:
        handle: What adopt() takes.
        process: QEMU.
        helpers: Processes that serve the VM.
        monitor: Connected.
        waiting: It was started for a frozen guest.
        aio: How it reads and writes disks.
    """

    def __init__(
        self,
        handle: VmHandle,
        process: DetachedProcess,
        helpers: list[DetachedProcess],
        monitor: Monitor,
        waiting: Waiting | None = None,
        *,
        aio: str = THREADS,
    ) -> None:
        super().__init__(handle, process, helpers, monitor, aio=aio)
        self._qmp = monitor
        self._waiting = waiting

    async def freeze(self) -> bytes:
        """Stop the guest for good and return its state."""
        summary = await self._qmp.execute("query-memory-size-summary")
        await freeze.give_back(self._qmp, int(summary["base-memory"]) // freeze.MIB)
        return await freeze.freeze(self._qmp)

    async def thaw(self, state: bytes) -> None:
        """Bring a frozen guest back, and plug in the vsock that it was frozen without."""
        waiting = self._waiting
        if waiting is None:
            raise HypervisorError("the VM was not started for a frozen guest, or has one already")
        await freeze.thaw(self._qmp, state)
        self._waiting = None
        with waiting.closing:
            if waiting.vsock is not None:
                await self._devices.attach_vsock(self._handle.cid, waiting.vsock, native=waiting.native)

    async def close(self) -> None:
        """Let go of the VM without ending it."""
        if self._waiting is not None:
            self._waiting.closing.close()
        await super().close()

    async def _unannounced(self, status: int | None) -> tuple[VmEnd, str]:
        end = VmEnd.KILLED if self._killed else end_by_status(status)
        said = tail_of(self.directory / "qemu.log", 300)
        how = "ended" if status in (None, 0) else f"ended with status {status}"
        return end, f"QEMU {how}: {said}" if status else f"QEMU {how}"
