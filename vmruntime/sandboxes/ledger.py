"""Releasing what a sandbox owns: one releaser a kind, used by failed starts, stops and restarted daemons alike."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from vmruntime import tracing
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import Internal, VmruntimeError
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.store.records import Ledger

log = structlog.get_logger(__name__)

UNTIL = "until"

Releaser = Callable[[Resource], Awaitable[None]]


class OwnedResources:
    """The ledger together with the knowledge how to release each kind of resource."""

    def __init__(self, ledger: Ledger, cgroups: HostCgroups) -> None:
        self.ledger = ledger
        self.cgroups = cgroups
        self._releasers: dict[ResourceKind, Releaser] = {
            ResourceKind.PROCESS: _end_process,
            ResourceKind.DIRECTORY: _remove_directory,
            ResourceKind.CGROUP: self._remove_cgroup,
            ResourceKind.CID: _nothing_to_do,
            ResourceKind.SPARE: _nothing_to_do,
        }

    def add_releaser(self, kind: ResourceKind, releaser: Releaser) -> None:
        """Teach how a kind is released; for parts that know their own resources, such as the network."""
        self._releasers[kind] = releaser

    async def directory(self, owner: str, path: Path, mode: int = 0o700, *, until_removed: bool = False) -> None:
        """Record and make a directory that goes, with all in it, when its owner stops (or only when it is removed)."""
        data = {UNTIL: "removed"} if until_removed else {}
        await self.ledger.record(Resource(owner=owner, kind=ResourceKind.DIRECTORY, key=str(path), data=data))
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        path.chmod(mode)

    async def cgroup(self, owner: str, path: str) -> None:
        """Record and make a cgroup."""
        await self.ledger.record(Resource(owner=owner, kind=ResourceKind.CGROUP, key=path))
        await self.cgroups.create(path)

    async def cgroup_of(self, owner: str) -> str:
        """Return the cgroup that an owner was given.

        Raises:
            Internal: It has none.
        """
        for resource in await self.ledger.owned_by(owner):
            if resource.kind is ResourceKind.CGROUP:
                return resource.key
        raise Internal(f"{owner[:13]} has no cgroup")

    async def process(self, owner: str, role: str, identity: ProcessIdentity) -> None:
        """Record a process that is about to become itself."""
        data = {"role": role, "start_time": str(identity.start_time)}
        await self.ledger.record(Resource(owner=owner, kind=ResourceKind.PROCESS, key=str(identity.pid), data=data))

    async def release(
        self,
        owner: str,
        *,
        keep: frozenset[ResourceKind] = frozenset(),
        final: bool = True,
        only: Callable[[Resource], bool] = lambda _: True,
    ) -> None:
        """Release everything an owner has, newest first, but for the kinds to keep and what `only` says no to.

        Without `final`, what lasts until the owner is removed stays too.

        One failure does not stop the others; what could not be released stays in the ledger for the next attempt.

        Raises:
            Internal: Something could not be released; the message lists it.
        """
        failures = []
        for resource in await self.ledger.owned_by(owner):
            if resource.kind in keep or not only(resource) or (not final and resource.data.get(UNTIL) == "removed"):
                continue
            try:
                await self._releasers[resource.kind](resource)
            except (VmruntimeError, OSError) as error:
                log.error("resource not released", kind=resource.kind.value, key=resource.key, error=str(error))
                failures.append(f"{resource.kind.value} {resource.key}: {error}")
            else:
                await self.ledger.forget(resource)
        if failures:
            raise Internal(f"not everything of {owner[:13]} could be released: {'; '.join(failures)}")

    @tracing.timed("release.cgroup")
    async def _remove_cgroup(self, resource: Resource) -> None:
        await self.cgroups.remove(resource.key)


def process_identity(resource: Resource) -> ProcessIdentity:
    """Return the process a ledger row names."""
    return ProcessIdentity(pid=int(resource.key), start_time=int(resource.data["start_time"]))


@tracing.timed("release.process")
async def _end_process(resource: Resource) -> None:
    await DetachedProcess(process_identity(resource)).end()


@tracing.timed("release.directory")
async def _remove_directory(resource: Resource) -> None:
    await in_thread(lambda: _remove_tree(Path(resource.key)))


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return


async def _nothing_to_do(resource: Resource) -> None:
    """A context id is only a number, a spare only a name: striking it out releases it."""
