"""The NIC that a VM has before its pod's network is known."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vmruntime import tracing
from vmruntime.hypervisor.interface import Nic, VirtualMachine
from vmruntime.network.tap import SpareTap
from vmruntime.sandboxes.sources.place import NIC


async def plug_in(vm: VirtualMachine, tap: SpareTap, close: Callable[[], Awaitable[None]]) -> None:
    """Plug in a NIC on a tap that will be the pod's.

    Args:
        vm: The VM.
        tap: The tap.
        close: Awaited when that fails: lets go of the VM.
    """
    try:
        with tracing.span("vm.nic"):
            await vm.attach_nic(Nic(id=NIC, mac=tap.mac), tap.fd)
    except BaseException:
        await close()
        raise
