"""How a domain ended, as libvirt remembers it."""

from __future__ import annotations

import msgspec

from vmruntime.hypervisor.interface import VmEnd
from vmruntime.hypervisor.libvirt.binding import libvirt
from vmruntime.hypervisor.qemu.endings import PANIC, REASONS


class Ending(msgspec.Struct, frozen=True):
    """An end and one sentence about it."""

    end: VmEnd
    why: str


LOST = Ending(VmEnd.LOST, "QEMU ended, and libvirt does not know why")

_BY_STATE = {
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN): Ending(*REASONS["guest-shutdown"]),
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED): Ending(*REASONS["host-qmp-quit"]),
    (libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_CRASHED_PANICKED): Ending(*REASONS[PANIC]),
}


def told_by_libvirt(state: int, reason: int) -> Ending | None:
    """Return the end that a domain's state tells (virDomainGetState); None: it has not ended.

    libvirt says "crashed" of a QEMU that ended without a word, so by SIGKILL or by a defect.
    """
    if (state, reason) in _BY_STATE:
        return _BY_STATE[state, reason]
    return LOST if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED) else None
