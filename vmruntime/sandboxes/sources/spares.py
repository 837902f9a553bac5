"""VMs that are no pod's yet: told from what nobody owns, and kept from taking the host's processors from pods."""

from __future__ import annotations

import structlog

from vmruntime.errors import VmruntimeError
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.sandboxes.cgroup import cgroup_path
from vmruntime.sandboxes.ledger import OwnedResources

log = structlog.get_logger(__name__)


class Spares:
    """The ledger's side of VMs that are no pod's yet."""

    def __init__(self, owned: OwnedResources, cgroup_parent: str) -> None:
        self._owned = owned
        self._cgroup_parent = cgroup_parent

    async def record(self, owner: str) -> str:
        """Write down that what will be this owner's is a spare VM's, to go with the daemon; return its cgroup."""
        await self._owned.ledger.record(Resource(owner=owner, kind=ResourceKind.SPARE, key=owner))
        return cgroup_path(self._cgroup_parent, owner)

    async def release(self, owner: str) -> None:
        """Release what a spare VM owns; what cannot be now stays in the ledger, for the next daemon."""
        try:
            await self._owned.release(owner)
        except VmruntimeError as error:
            log.error("a VM that was no pod's left something behind", sandbox=owner, error=str(error))

    async def hand_over(self, owner: str, cgroup: str) -> None:
        """Make a spare VM a pod's, which runs in another cgroup or in the same one."""
        own = cgroup_path(self._cgroup_parent, owner)
        if cgroup == own:
            await self._owned.cgroups.set_low(own, low=False)
        else:
            await self._owned.cgroup(owner, cgroup)
            for resource in await self._owned.ledger.owned_by(owner):
                if resource.kind is ResourceKind.PROCESS:
                    await self._owned.cgroups.add(cgroup, int(resource.key))
            await self._owned.release(owner, only=lambda one: one.kind is ResourceKind.CGROUP and one.key == own)
        await self._owned.ledger.forget(Resource(owner=owner, kind=ResourceKind.SPARE, key=owner))
