"""One running QEMU that the daemon started by itself."""

from __future__ import annotations

from vmruntime.hypervisor.endings import end_by_status
from vmruntime.hypervisor.interface import VmEnd
from vmruntime.hypervisor.qmp.vm import QmpVm
from vmruntime.hypervisor.vsock import tail_of


class QemuVm(QmpVm):
    """A VM of the QEMU driver."""

    async def _unannounced(self, status: int | None) -> tuple[VmEnd, str]:
        end = VmEnd.KILLED if self._killed else end_by_status(status)
        said = tail_of(self.directory / "qemu.log", 300)
        how = "ended" if status in (None, 0) else f"ended with status {status}"
        return end, f"QEMU {how}: {said}" if status else f"QEMU {how}"
