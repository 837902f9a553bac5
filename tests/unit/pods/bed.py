"""Daemons without a socket: the use cases of pods over sandboxes, images and a network in memory, and a real store.

The world (machines, addresses, images, files) outlives a daemon, so that one can be killed at any step and the next one
started on what it left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.support.fake_backend import FakeBackend, FakeMachine
from tests.support.fakes import FakeClock, FakeImages, FakeNetwork, make_image
from vmruntime.aio.faults import EVERY_STEP, Faults
from vmruntime.aio.threads import SerialThread
from vmruntime.model.container import Container, ContainerMetadata, ContainerSpec, ContainerState
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import SandboxKind, SandboxMetadata, SandboxSpec
from vmruntime.paths import Paths
from vmruntime.pods.context import Context
from vmruntime.pods.interface import Pods
from vmruntime.pods.recovery import recover
from vmruntime.pods.registry import Registry
from vmruntime.pods.service import PodService
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.store.database import Database
from vmruntime.store.records import Ledger, PodRecords

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds that anything may take on a loaded machine."""


TRAP = "trap 'exit 7' TERM; echo ready; sleep 1000"
"""A script that ends with 7 when it gets SIGTERM, once it is ready."""


MEMORY = Path("/dev/shm")


def place_of_its_own() -> tempfile.TemporaryDirectory[str]:
    """Return a new directory, in memory where that can be: ext4 gets slow when hundreds of worlds come and go.

    Its path is short, as those of unix sockets must be; pytest's are not.
    """
    in_memory = os.access(MEMORY, os.W_OK | os.X_OK)
    return tempfile.TemporaryDirectory(prefix="vmr-", dir=MEMORY if in_memory else "/tmp")


class Killed(BaseException):
    """Ends the tasks of a daemon that is no more."""


class NoThread(SerialThread):
    """Runs in the event loop what takes next to no time there: a store in memory is asked ten thousands of times."""

    async def run(self, function: Callable[[], T]) -> T:
        result = function()
        await asyncio.sleep(0)
        return result


class StepStore(Database):
    """A store whose writes are steps, and which a killed daemon cannot use any more."""

    killed = False

    def __init__(self, path: Path, faults: Faults) -> None:
        super().__init__(path)
        self.faults = faults
        self._thread = NoThread("store")

    async def read(self, query: Callable[[Any], T]) -> T:
        if self.killed:
            raise Killed
        return await super().read(query)

    async def write(self, change: Callable[[Any], T], *, adds: bool = False) -> T:
        await self.faults.at("store.write")
        result = await super().write(change, adds=adds)
        await self.faults.at("store.write done")
        return result


class World:
    """What daemons find and leave.

    Attributes:
        backend, network, images: The fakes; they belong to the daemon that was started last.
        ids: How many ids were handed out.
    """

    def __init__(self, base: Path) -> None:
        self.paths = Paths(base / "root", base / "run")
        for path in (self.paths.root, self.paths.run / "logs", self.paths.layers):
            path.mkdir(parents=True)
        self.clock = FakeClock()
        self.backend = FakeBackend(Faults(), self.clock.now_ns)
        self.network = FakeNetwork()
        self.images = FakeImages(self.paths.layers)
        self.images.add(make_image("busybox", "ab"))
        self.images.add(make_image("data", "bc"))
        self.ids = 0

    def new_id(self) -> str:
        self.ids += 1
        return self.id_number(self.ids)

    @staticmethod
    def id_number(number: int) -> str:
        """Return the id that is handed out as this one, counted from 1."""
        return f"{number:013x}".ljust(64, "0")

    def log(self, name: str = "app") -> str:
        """Return what a container's log says, without times: "stdout F text" a line."""
        lines = (self.paths.root / "logs" / f"{name}.log").read_text().splitlines()
        return "\n".join(line.split(" ", 1)[1] for line in lines)


class Daemon:
    """A daemon's inside.

    Attributes:
        faults: What goes wrong in it, in its store, and in the guests it talks to.
        pods: The use cases.
    """

    def __init__(self, world: World, database: StepStore, faults: Faults) -> None:
        self.world = world
        self.faults = faults
        self.database = database
        self.owned = OwnedResources(Ledger(database), HostCgroups([]))
        self.owned.add_releaser(ResourceKind.NETWORK, self._release_network)
        world.backend.serve(self.owned, faults)
        world.network.faults = world.images.faults = faults
        self.context = Context(
            registry=Registry(PodRecords(database), world.clock),
            owned=self.owned,
            backends={SandboxKind.CONTAINER: world.backend},
            network=world.network,
            images=world.images,
            clock=world.clock,
            new_id=world.new_id,
            paths=world.paths,
            load_profile=lambda name: b"{}",
        )
        self.pods: Pods = PodService(self.context)

    @classmethod
    async def start(cls, world: World, faults: Faults | None = None) -> Daemon:
        """Open the store and recover."""
        database = StepStore(world.paths.database, faults or Faults())
        await database._thread.run(database._open)
        daemon = cls(world, database, database.faults)
        await recover(daemon.context)
        return daemon

    async def kill(self) -> None:
        """End as by SIGKILL: nothing is undone, written or told any more."""
        self.faults.fail(EVERY_STEP, Killed(), times=-1)
        self.database.killed = True
        await self.database.close()
        await self._let_go()

    async def stop(self) -> None:
        """End as by SIGTERM: the pods go on."""
        await self._let_go()
        await self.database.close()

    async def _let_go(self) -> None:
        await self.context.scope.close()
        for live in list(self.context.live.values()):
            await live.scope.close()
            await live.running.close()
        for held in self.world.backend.held:
            await held.close()

    async def _release_network(self, resource: Resource) -> None:
        await self.world.network.teardown(resource.key)

    def machine(self, pod: str) -> FakeMachine:
        return self.world.backend.machines[pod]

    async def run_pod(self, name: str = "web", **fields: Any) -> str:
        return await self.pods.run_sandbox(sandbox_spec(name, **fields))

    async def create(self, pod: str, *argv: str, name: str = "app", **fields: Any) -> str:
        spec = self.spec(*argv, name=name, **fields)
        return await self.pods.create_container(pod, spec)

    async def run(self, pod: str, *argv: str, name: str = "app", **fields: Any) -> str:
        """Create and start a container."""
        container = await self.create(pod, *argv, name=name, **fields)
        await self.pods.start_container(container)
        return container

    def spec(self, *argv: str, name: str = "app", **fields: Any) -> ContainerSpec:
        fields.setdefault("image", "docker.io/library/busybox:1")
        fields.setdefault("log_path", str(self.world.paths.root / "logs" / f"{name}.log"))
        return ContainerSpec(
            metadata=ContainerMetadata(name=name, attempt=fields.pop("attempt", 0)),
            command=list(argv or ("sleep", "1000")),
            **fields,
        )

    async def ended(self, container: str) -> Container:
        """Wait until a container has exited."""
        async with asyncio.timeout(PATIENCE):
            await self.context.registry.wait_ended(container)
        found = self.pods.container(container)
        assert found.state is ContainerState.EXITED
        return found

    async def nothing_left(self, *, pods: int = 0) -> None:
        """Check that this many pods are there, with nothing more than they need, and nothing else."""
        context, world = self.context, self.world
        kept = {one.id for one in context.registry.sandboxes(hidden=True)}
        assert len(kept) == pods
        assert {one.sandbox_id for one in context.registry.containers(hidden=True)} <= kept
        assert set(context.live) == set(world.backend.running) == set(world.network.attached) == kept
        assert {one.owner for one in await self.owned.ledger.all()} == kept
        assert context.handover == set()
        assert context.locks._locks == {}
        assert all(tap.fd == -1 for tap in world.network.taps)
        assert [held for held in world.backend.held if not held.closed] == [
            one.running for one in context.live.values()
        ]
        if not pods:
            assert list((world.paths.run / "logs").iterdir()) == []
        sandboxes, containers = await PodRecords(self.database).load()
        assert {one.id: one.state for one in sandboxes} == {
            one.id: one.state for one in context.registry.sandboxes(hidden=True)
        }
        assert {one.id for one in containers} == {one.id for one in context.registry.containers(hidden=True)}

    def pod_as_new(self, pod: str) -> None:
        """Check that a pod has nothing of any container."""
        machine = self.machine(pod)
        assert (machine.layers, machine.volumes, machine.devices) == (set(), {}, set())
        assert machine.guest.containers == {}
        assert self.context.live[pod].pumps == {}
        assert self.context.registry.containers_of(pod, hidden=True) == []
        assert list((self.world.paths.run / "logs").iterdir()) == []


async def until_ready(daemon: Daemon, name: str = "app") -> None:
    """Wait until a container has said in its log that it is ready."""
    async with asyncio.timeout(PATIENCE):
        while "ready" not in daemon.world.log(name):
            await asyncio.sleep(0.01)


def state(daemon: Daemon, container: str) -> ContainerState:
    return daemon.pods.container(container).state


def sandbox_spec(name: str = "web", attempt: int = 0, **fields: Any) -> SandboxSpec:
    return SandboxSpec(metadata=SandboxMetadata(name=name, uid="u", namespace="n", attempt=attempt), **fields)


@contextlib.asynccontextmanager
async def daemon_on(base: Path) -> AsyncIterator[Daemon]:
    """Yield a daemon in a world of its own; afterwards its pods are removed and nothing is left."""
    daemon = await Daemon.start(World(base))
    try:
        yield daemon
        async with asyncio.timeout(PATIENCE):
            for sandbox in daemon.pods.sandboxes():
                await daemon.pods.remove_sandbox(sandbox.id)
        await daemon.nothing_left()
    finally:
        await daemon.stop()
        for machine in daemon.world.backend.machines.values():
            await machine.end("the test is over")
