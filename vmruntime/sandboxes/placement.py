"""Where a VM and its helpers run on the host: their cgroup, and the record of each process."""

from __future__ import annotations

import structlog

from vmruntime.aio.detached import ProcessIdentity
from vmruntime.hypervisor.interface import Recorder
from vmruntime.model.resources import VmSize
from vmruntime.model.sandbox import Sandbox
from vmruntime.sandboxes.cgroup import cgroup_path
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.sandboxes.size import HOST_OVERHEAD_MIB, MIB

log = structlog.get_logger(__name__)


async def choose_cgroup(owned: OwnedResources, sandbox: Sandbox, size: VmSize, parent: str) -> str:
    """Return where a VM goes: under kubelet's parent, unless its memory limit would get the VM killed.

    kubelet's limit is the containers' plus the RuntimeClass's overhead; without one there is no room for the guest's
    kernel and QEMU.

    Args:
        owned: The ledger.
        sandbox: What it is for.
        size: Of the VM.
        parent: Where VMs go whose pod names no parent, or none that has room.
    """
    own = cgroup_path(parent, sandbox.id)
    if not sandbox.spec.cgroup_parent:
        return own
    wanted = cgroup_path(sandbox.spec.cgroup_parent, sandbox.id)
    limit = await owned.cgroups.memory_limit(wanted)
    needed = (size.memory_mib + HOST_OVERHEAD_MIB) * MIB
    if limit is None or limit >= needed:
        return wanted
    log.warning(
        "the pod's cgroup is too small for its VM, which runs outside of it",
        sandbox=sandbox.id,
        limit_mib=limit // MIB,
        needed_mib=needed // MIB,
        remedy="a RuntimeClass with overhead.podFixed",
    )
    return own


def recorder(owned: OwnedResources, sandbox_id: str) -> Recorder:
    """Return what writes down a process of a VM and puts it into the pod's cgroup before it runs."""

    async def record(role: str, identity: ProcessIdentity) -> None:
        await owned.process(sandbox_id, role, identity)
        await owned.cgroups.add(await owned.cgroup_of(sandbox_id), identity.pid)

    return record
