"""Every sandbox and container, in memory for reads and in the store for good.

A change is written to the store first; only then is it shown by lists and told to listeners.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from vmruntime import tracing
from vmruntime.clock import Clock
from vmruntime.errors import AlreadyExists, NotFound
from vmruntime.model.container import Container, ContainerState
from vmruntime.model.lifecycle import check_container_step, check_sandbox_step
from vmruntime.model.sandbox import Sandbox, SandboxState
from vmruntime.pods.broadcast import Broadcast
from vmruntime.pods.interface import PodEvent, PodEventKind
from vmruntime.store.records import PodRecords

HIDDEN_SANDBOXES = frozenset({SandboxState.CREATING})
HIDDEN_CONTAINERS = frozenset({ContainerState.CREATING})
ENDED = frozenset({ContainerState.EXITED, ContainerState.REMOVING})


class Registry:
    """The pods this daemon knows."""

    def __init__(self, records: PodRecords, clock: Clock) -> None:
        self._records = records
        self._clock = clock
        self._sandboxes: dict[str, Sandbox] = {}
        self._containers: dict[str, Container] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._broadcast = Broadcast()

    async def load(self) -> None:
        """Read everything from the store."""
        sandboxes, containers = await self._records.load()
        self._sandboxes = {sandbox.id: sandbox for sandbox in sandboxes}
        self._containers = {container.id: container for container in containers}
        for container in containers:
            self._track_end(container)

    def sandbox(self, sandbox_id: str) -> Sandbox:
        """Return a sandbox, or raise NotFound."""
        found = self._sandboxes.get(sandbox_id)
        if found is None:
            raise NotFound(f"no sandbox has the id {sandbox_id!r}")
        return found

    def container(self, container_id: str) -> Container:
        """Return a container, or raise NotFound."""
        found = self._containers.get(container_id)
        if found is None:
            raise NotFound(f"no container has the id {container_id!r}")
        return found

    def sandboxes(self, *, hidden: bool = False) -> list[Sandbox]:
        """Return sandboxes by age; those being created only when asked for. May be called in any thread."""
        chosen = [s for s in tuple(self._sandboxes.values()) if hidden or s.state not in HIDDEN_SANDBOXES]
        return sorted(chosen, key=lambda s: (s.created_at, s.id))

    def containers(self, *, hidden: bool = False) -> list[Container]:
        """Return containers by age; those being created only when asked for. May be called in any thread."""
        chosen = [c for c in tuple(self._containers.values()) if hidden or c.state not in HIDDEN_CONTAINERS]
        return sorted(chosen, key=lambda c: (c.created_at, c.id))

    def containers_of(self, sandbox_id: str, *, hidden: bool = False) -> list[Container]:
        """Return a sandbox's containers by age."""
        return [c for c in self.containers(hidden=hidden) if c.sandbox_id == sandbox_id]

    async def add_sandbox(self, sandbox: Sandbox) -> None:
        """Write down a new sandbox; raise AlreadyExists when its name is taken."""
        await self._records.put_sandbox(sandbox)
        self._sandboxes[sandbox.id] = sandbox

    async def change_sandbox(self, sandbox_id: str, **changes: Any) -> Sandbox:
        """Change fields of a sandbox, checking that its state may take the step."""
        before = self.sandbox(sandbox_id)
        after = msgspec.structs.replace(before, **changes)
        check_sandbox_step(before.state, after.state)
        await self._records.put_sandbox(after)
        self._sandboxes[sandbox_id] = after
        if after.state is not before.state:
            self._tell_sandbox(before.state, after)
        return after

    async def drop_sandbox(self, sandbox_id: str) -> None:
        """Forget a sandbox and its containers."""
        sandbox = self._sandboxes.get(sandbox_id)
        await self._records.delete_sandbox(sandbox_id)
        for container in self.containers_of(sandbox_id, hidden=True):
            self._forget_container(container)
        self._sandboxes.pop(sandbox_id, None)
        tracing.RECORDER.gone(sandbox_id)
        if sandbox is not None and sandbox.state not in HIDDEN_SANDBOXES:
            self._tell(PodEventKind.DELETED, sandbox_id, None, [])

    async def add_container(self, container: Container) -> None:
        """Write down a new container; raise AlreadyExists when its sandbox has one of that name."""
        for other in self.containers_of(container.sandbox_id, hidden=True):
            if other.spec.metadata == container.spec.metadata:
                name = f"{container.spec.metadata.name} (attempt {container.spec.metadata.attempt})"
                raise AlreadyExists(f"the container name {name} is taken in its sandbox by {other.id}")
        self._containers[container.id] = container  # before the await: two calls must not both pass the check
        try:
            await self._records.put_container(container)
        except BaseException:
            self._containers.pop(container.id, None)
            raise
        self._track_end(container)

    async def change_container(self, container_id: str, **changes: Any) -> Container:
        """Change fields of a container, checking that its state may take the step."""
        before = self.container(container_id)
        after = msgspec.structs.replace(before, **changes)
        check_container_step(before.state, after.state)
        await self._records.put_container(after)
        self._containers[container_id] = after
        if after.state in ENDED:
            self._ended[container_id].set()
        if after.state is not before.state:
            self._tell_container(after)
        return after

    async def drop_container(self, container_id: str) -> None:
        """Forget a container."""
        container = self._containers.get(container_id)
        await self._records.delete_container(container_id)
        if container is not None:
            self._forget_container(container)
            if container.state not in HIDDEN_CONTAINERS:
                self._tell(
                    PodEventKind.DELETED,
                    container_id,
                    self._sandboxes.get(container.sandbox_id),
                    self.containers_of(container.sandbox_id),
                )

    async def wait_ended(self, container_id: str) -> None:
        """Wait until a container has exited or is gone."""
        event = self._ended.get(container_id)
        if event is not None:
            await event.wait()

    def events(self) -> AsyncIterator[PodEvent]:
        """Iterate over changes from now on."""
        return self._broadcast.listen()

    def _track_end(self, container: Container) -> None:
        event = self._ended.setdefault(container.id, asyncio.Event())
        if container.state in ENDED:
            event.set()

    def _forget_container(self, container: Container) -> None:
        self._containers.pop(container.id, None)
        event = self._ended.pop(container.id, None)
        if event is not None:
            event.set()

    def _tell_sandbox(self, before: SandboxState, after: Sandbox) -> None:
        kinds = {SandboxState.READY: PodEventKind.STARTED, SandboxState.NOTREADY: PodEventKind.STOPPED}
        if after.state not in kinds:
            return
        containers = self.containers_of(after.id)
        if before is SandboxState.CREATING and after.state is SandboxState.READY:
            self._tell(PodEventKind.CREATED, after.id, after, containers)
        self._tell(kinds[after.state], after.id, after, containers)

    def _tell_container(self, container: Container) -> None:
        kinds = {
            ContainerState.CREATED: PodEventKind.CREATED,
            ContainerState.RUNNING: PodEventKind.STARTED,
            ContainerState.EXITED: PodEventKind.STOPPED,
        }
        if container.state in kinds:
            sandbox = self._sandboxes.get(container.sandbox_id)
            self._tell(kinds[container.state], container.id, sandbox, self.containers_of(container.sandbox_id))

    def _tell(self, kind: PodEventKind, subject: str, sandbox: Sandbox | None, containers: list[Container]) -> None:
        event = PodEvent(kind=kind, id=subject, time=self._clock.now_ns(), sandbox=sandbox, containers=containers)
        self._broadcast.tell(event)
