"""How a machine is found again after a restart of the daemon."""

from __future__ import annotations

from pathlib import Path

from vmruntime.aio.detached import ProcessIdentity
from vmruntime.hypervisor.errors import VmGone
from vmruntime.hypervisor.interface import VmHandle
from vmruntime.hypervisor.vsock import hybrid_socket
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.sandbox import Sandbox
from vmruntime.sandboxes.image_vm.boot import machine_uuid
from vmruntime.sandboxes.ledger import process_identity
from vmruntime.sandboxes.vm_volumes import SHARE_ROLE
from vmruntime.store.records import Ledger


async def machine_handle(sandbox: Sandbox, directory: Path, ledger: Ledger, driver: str) -> VmHandle:
    """Put together, from the ledger, what a hypervisor needs to find a pod's VM again.

    Args:
        sandbox: The pod.
        directory: Its runtime directory.
        ledger: Has the VM's processes.
        driver: Name of the hypervisor, if the ledger does not say.

    Raises:
        VmGone: The ledger has no VM.
    """
    processes: dict[str, ProcessIdentity] = {}
    cid = 0
    for resource in await ledger.owned_by(sandbox.id):
        if resource.kind is ResourceKind.PROCESS:
            processes.setdefault(resource.data["role"], process_identity(resource))
        elif resource.kind is ResourceKind.CID:
            cid = int(resource.key)
        elif resource.kind is ResourceKind.MACHINE:
            driver = resource.data["driver"]
    if "qemu" not in processes:
        raise VmGone("it was never started")
    return VmHandle(
        id=sandbox.id,
        driver=driver,
        process=processes["qemu"],
        helpers=[processes[role] for role in ("vsock", SHARE_ROLE) if role in processes],
        directory=str(directory),
        cid=cid,
        vsock=str(hybrid_socket(directory)) if "vsock" in processes else "",
        uuid=machine_uuid(sandbox),
    )
