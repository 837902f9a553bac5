"""Daemons as in bed.py whose pods are of kind image: machines of the fake hypervisor, made by the real backend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from tests.support.fakes import FakeNetwork, FakeTap, make_image
from tests.unit.pods.bed import PATIENCE, Daemon, StepStore, World, place_of_its_own, sandbox_spec
from vmruntime.aio.faults import Faults
from vmruntime.aio.inotify import FileChanges
from vmruntime.config.settings import HypervisorSettings, Settings
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.hypervisor.fake_machine import FakeMachine
from vmruntime.model.container import ContainerMetadata, ContainerSpec
from vmruntime.model.image import DiskImage
from vmruntime.model.image_pod import ImagePod
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import PodNetwork, Sandbox, SandboxKind
from vmruntime.network.tap import SpareTap
from vmruntime.pods.recovery import recover
from vmruntime.sandboxes.image_vm.backend import ImageVmBackend
from vmruntime.sandboxes.image_vm.parts import MachineParts
from vmruntime.store.records import PodRecords

UP = "guest: up"


class Guest:
    """Says that it is up, on the console only."""

    async def boot(self, machine: FakeMachine) -> None:
        machine.say(UP)

    async def die(self) -> None:
        return


class Network6(FakeNetwork):
    """A network without IPv4, so that machines need no DHCP server; its namespaces are files."""

    def __init__(self, namespaces: Path) -> None:
        super().__init__()
        self._namespaces = namespaces

    async def add(self, sandbox: Sandbox, spare: SpareTap | None = None) -> tuple[PodNetwork, list[FakeTap]]:
        network, taps = await super().add(sandbox, spare)
        nics = [replace(nic, addresses=["fd00::2/64"]) for nic in network.interfaces]
        netns = self._namespaces / sandbox.id
        netns.touch()
        return replace(network, netns=str(netns), interfaces=nics), taps


class ImageWorld(World):
    """What daemons find and leave.

    Attributes:
        hypervisor: Has the machines.
        changes: Tells when their consoles' files grow.
    """

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        (base / "netns").mkdir()
        self.hypervisor = FakeHypervisor(lambda spec: Guest())
        self.network = Network6(base / "netns")
        self.changes = FileChanges()
        disk = DiskImage(digest="sha256:" + "e" * 64, format="qcow2", virtual_size=1 << 20, file_size=4096)
        self.images.add(replace(make_image("vm", ""), disk=disk))

    @property
    def machines(self) -> list[FakeMachine]:
        """Those that run."""
        return [one for one in self.hypervisor.machines.values() if not one.ended]

    def definitions(self) -> dict[Path, bytes]:
        """Return what is written down of machines: the tasks of a killed daemon still write files at their end."""
        return {path: path.read_bytes() for path in self.paths.pods.glob("*/machine.json")}

    def put_back(self, definitions: dict[Path, bytes]) -> None:
        """Make it so again."""
        for path in self.paths.pods.glob("*/machine.json"):
            path.unlink()
        for path, content in definitions.items():
            path.write_bytes(content)

    async def close(self) -> None:
        await self.hypervisor.close()
        self.changes.close()


class ImageDaemon(Daemon):
    """A daemon's inside; its pods are of kind image."""

    world: ImageWorld

    def __init__(self, world: ImageWorld, database: StepStore, faults: Faults) -> None:
        super().__init__(world, database, faults)
        world.hypervisor.faults = faults
        for machine in world.hypervisor.machines.values():
            machine.faults = faults
        self.owned.add_releaser(ResourceKind.MACHINE, self._forget_machine)
        parts = MachineParts(
            hypervisors={"fake": world.hypervisor},
            driver="fake",
            owned=self.owned,
            paths=world.paths,
            settings=Settings(
                root=str(world.paths.root),
                run=str(world.paths.run),
                hypervisor=HypervisorSettings(user=pwd.getpwuid(os.geteuid()).pw_name),
            ),
            clock=world.clock,
            changes=world.changes,
            open_taps=world.network.open_taps,
        )
        self.context.backends[SandboxKind.IMAGE] = ImageVmBackend(parts, 16384)

    @classmethod
    async def open(cls, world: ImageWorld, faults: Faults | None = None) -> ImageDaemon:
        """Open the store and recover."""
        database = StepStore(world.paths.database, faults or Faults())
        await database._thread.run(database._open)
        daemon = cls(world, database, database.faults)
        await recover(daemon.context)
        return daemon

    def vm(self, pod: str) -> FakeMachine:
        return self.world.hypervisor.machines[pod]

    async def run_image_pod(self, name: str = "web", **asked: Any) -> str:
        spec = sandbox_spec(name, kind=SandboxKind.IMAGE, image_pod=ImagePod(**asked))
        return await self.pods.run_sandbox(spec)

    def vm_spec(self, attempt: int = 0, **fields: Any) -> ContainerSpec:
        fields.setdefault("image", "docker.io/library/vm:1")
        fields.setdefault("log_path", str(self.world.paths.root / "logs" / f"vm{attempt}.log"))
        return ContainerSpec(metadata=ContainerMetadata(name="vm", attempt=attempt), **fields)

    async def create_vm(self, pod: str, attempt: int = 0, **fields: Any) -> str:
        return await self.pods.create_container(pod, self.vm_spec(attempt, **fields))

    async def run_vm(self, pod: str, attempt: int = 0, **fields: Any) -> str:
        container = await self.create_vm(pod, attempt, **fields)
        await self.pods.start_container(container)
        return container

    async def nothing_left(self, *, pods: int = 0) -> None:
        """Check that this many pods are there, with nothing more than they need, and nothing else."""
        context, world = self.context, self.world
        kept = {one.id for one in context.registry.sandboxes(hidden=True)}
        assert len(kept) == pods
        assert {one.sandbox_id for one in context.registry.containers(hidden=True)} <= kept
        assert set(context.live) == set(world.network.attached) == kept
        assert {one.owner for one in await self.owned.ledger.all()} == kept
        assert context.handover == set()
        assert context.locks._locks == {}
        assert all(tap.fd == -1 for tap in world.network.taps)
        assert {machine.spec.id for machine in world.machines} <= kept
        if not pods:
            assert list((world.paths.run / "logs").iterdir()) == []
            for places in (world.paths.sandboxes, world.paths.pods):
                assert not places.exists() or list(places.iterdir()) == []
        sandboxes, containers = await PodRecords(self.database).load()
        assert {one.id for one in sandboxes} == kept
        assert {one.id for one in containers} == {one.id for one in context.registry.containers(hidden=True)}

    def pod_as_new(self, pod: str) -> None:
        """Check that a pod has nothing of any container but its disk."""
        disks = {path.name for path in self.world.paths.pod_disks(pod).iterdir()}
        assert disks <= {"root.qcow2", "root.qcow2.base", "seed.iso"}
        assert pod not in self.world.hypervisor.machines or self.vm(pod).ended
        assert self.context.live[pod].pumps == {}
        assert self.context.registry.containers_of(pod, hidden=True) == []
        assert list((self.world.paths.run / "logs").iterdir()) == []

    async def _forget_machine(self, resource: Resource) -> None:
        await self.world.hypervisor.forget(resource.key)


@contextlib.asynccontextmanager
async def image_world() -> AsyncIterator[ImageWorld]:
    """Yield a world; afterwards its machines end."""
    with place_of_its_own() as directory:
        world = ImageWorld(Path(directory))
        try:
            yield world
        finally:
            await world.close()


@contextlib.asynccontextmanager
async def image_daemon() -> AsyncIterator[ImageDaemon]:
    """Yield a daemon in a world of its own; afterwards its pods are removed and nothing is left."""
    async with image_world() as world:
        daemon = await ImageDaemon.open(world)
        try:
            yield daemon
            async with asyncio.timeout(PATIENCE):
                for sandbox in daemon.pods.sandboxes():
                    await daemon.pods.remove_sandbox(sandbox.id)
            await daemon.nothing_left()
        finally:
            await daemon.stop()
