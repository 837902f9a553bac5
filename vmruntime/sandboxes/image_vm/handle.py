"""What the ledger has of a machine: its UUID, which no other pod may have, and what it is found again by."""

from __future__ import annotations

from pathlib import Path

from vmruntime.aio.detached import ProcessIdentity
from vmruntime.errors import AlreadyExists, FailedPrecondition
from vmruntime.hypervisor.errors import VmGone
from vmruntime.hypervisor.interface import VmHandle
from vmruntime.hypervisor.vsock import hybrid_socket
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Sandbox
from vmruntime.sandboxes.image_vm.boot import machine_uuid
from vmruntime.sandboxes.ledger import process_identity
from vmruntime.sandboxes.vm_volumes import SHARE_ROLE
from vmruntime.store.records import Ledger


async def claim_uuid(sandbox: Sandbox, ledger: Ledger, driver: str) -> None:
    """Write down a pod's machine, unless another pod has one with its UUID.

    Args:
        sandbox: The pod.
        ledger: Gets it.
        driver: Name of the hypervisor that it is to run under.

    Raises:
        FailedPrecondition: Another pod has; nothing was done.
    """
    uuid = machine_uuid(sandbox)
    try:
        await ledger.claim(Resource(owner=sandbox.id, kind=ResourceKind.MACHINE, key=uuid, data={"driver": driver}))
    except AlreadyExists as error:
        raise FailedPrecondition(
            f"annotation vmruntime.io/system-uuid: {uuid!r} is taken by another pod's machine: {error}",
            remedy="give each pod a UUID of its own, or leave the annotation out",
        ) from error


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
