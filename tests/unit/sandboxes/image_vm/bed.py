"""Image pods over the fake hypervisor: what the world has (machines, ledger, directories) outlives a backend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from tests.support.fakes import FakeClock, FakeTap
from tests.unit.pods.bed import StepStore, place_of_its_own
from vmruntime.agent.interface import GuestContainer, GuestContainerState, GuestMachine
from vmruntime.aio.faults import Faults
from vmruntime.aio.inotify import FileChanges
from vmruntime.config.settings import HypervisorSettings, Settings
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.hypervisor.fake_machine import FakeMachine
from vmruntime.model.container import ContainerMetadata, ContainerSpec
from vmruntime.model.image import DiskImage
from vmruntime.model.image_pod import ImagePod
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.resources import VmSize
from vmruntime.model.sandbox import (
    NetworkInterface,
    PodNetwork,
    Sandbox,
    SandboxKind,
    SandboxMetadata,
    SandboxSpec,
    SandboxState,
)
from vmruntime.paths import Paths
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.image_vm.backend import ImageVmBackend
from vmruntime.sandboxes.image_vm.parts import MachineParts
from vmruntime.sandboxes.image_vm.sandbox import ImageSandbox
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.sandboxes.vm_volumes import release_share
from vmruntime.store.records import Ledger

PATIENCE = 20.0
UP = "guest: up"
DISK = DiskImage(digest="sha256:" + "d" * 64, format="qcow2", virtual_size=1 << 20, file_size=4096)
POD_HAS = {ResourceKind.DIRECTORY, ResourceKind.CGROUP}
"""What a pod has in the ledger while it has no machine."""


class Guest:
    """Says that it is up, on the console only."""

    async def boot(self, machine: FakeMachine) -> None:
        machine.say(UP)

    async def die(self) -> None:
        return


def user() -> str:
    """The account of VMs in these tests: that of the tests."""
    return pwd.getpwuid(os.geteuid()).pw_name


class Bed:
    """A host with image pods.

    Attributes:
        faults: Of hypervisor, ledger and network.
        taps: All that were ever opened.
        settings: Of the next backend.
    """

    def __init__(self, base: Path, database: StepStore) -> None:
        self.base = base
        self.faults = database.faults
        self.paths = Paths(base / "root", base / "run")
        self.paths.sandboxes.mkdir(parents=True)
        self.settings = Settings(
            root=str(self.paths.root), run=str(self.paths.run), hypervisor=HypervisorSettings(user=user())
        )
        self.hypervisor = FakeHypervisor(lambda spec: Guest(), self.faults)
        self.owned = OwnedResources(Ledger(database), HostCgroups([]))
        self.owned.add_releaser(ResourceKind.MACHINE, self._forget)
        self.owned.add_releaser(ResourceKind.SHARE, release_share)
        self.clock = FakeClock()
        self.changes = FileChanges()
        self.taps: list[FakeTap] = []
        self.image = base / "image.qcow2"
        self.image.write_bytes(b"\0" * DISK.file_size)
        (base / "netns").touch()
        self._number = 0

    def backend(self) -> ImageVmBackend:
        """Return what a daemon has."""
        parts = MachineParts(
            hypervisors={"fake": self.hypervisor},
            driver="fake",
            owned=self.owned,
            paths=self.paths,
            settings=self.settings,
            clock=self.clock,
            changes=self.changes,
            open_taps=self._open_taps,
        )
        return ImageVmBackend(parts, 16384)

    def sandbox(self, *addresses: str, **asked: Any) -> Sandbox:
        """Return the record of a pod that asks for something; without IPv4, so that it needs no DHCP server."""
        self._number += 1
        nic = NetworkInterface(
            name="eth0", mac="02:00:00:00:00:01", mtu=1450, addresses=list(addresses or ["fd00::2/64"]), tap="tap_eth0"
        )
        return Sandbox(
            id=f"{self._number:013x}".ljust(64, "0"),
            spec=SandboxSpec(
                metadata=SandboxMetadata(name=f"vm{self._number}", uid="u", namespace="n"),
                kind=SandboxKind.IMAGE,
                image_pod=ImagePod(**asked),
            ),
            state=SandboxState.READY,
            created_at=1,
            network=PodNetwork(netns=str(self.base / "netns"), interfaces=[nic]),
        )

    def container(self, identifier: str = "c", **fields: Any) -> GuestContainer:
        """Return a request to create the container of a pod."""
        spec = ContainerSpec(metadata=ContainerMetadata(name="vm", attempt=0), image="vm", **fields)
        size = VmSize(vcpus=1, memory_mib=1024, max_vcpus=2, max_memory_mib=16384)
        machine = GuestMachine(
            spec=spec, image_id="sha256:" + "a" * 64, disk=DISK, disk_path=str(self.image), size=size
        )
        return GuestContainer(id=identifier, machine=machine)

    async def kinds(self, sandbox: Sandbox) -> set[ResourceKind]:
        """Return what a pod has in the ledger."""
        return {one.kind for one in await self.owned.ledger.owned_by(sandbox.id)}

    async def no_machine(self, sandbox: Sandbox, *, but: Iterable[ResourceKind] = ()) -> None:
        """Check that of a pod's machine nothing is left that runs, or is reserved."""
        assert await self.kinds(sandbox) == POD_HAS | set(but)
        assert all(tap.fd == -1 for tap in self.taps)
        machine = self.hypervisor.machines.get(sandbox.id)
        assert machine is None or machine.ended

    @contextlib.asynccontextmanager
    async def started(self, sandbox: Sandbox | None = None) -> AsyncIterator[Pod]:
        """Yield a pod; afterwards it is released, and nothing of it is left."""
        sandbox = sandbox or self.sandbox()
        pod = Pod(self, sandbox, await self.backend().start(sandbox))
        try:
            yield pod
        finally:
            await pod.running.close()
            await self.backend().release(sandbox.id, final=True)
        assert await self.owned.ledger.owned_by(sandbox.id) == []
        assert not self.paths.sandbox(sandbox.id).exists()
        assert not self.paths.pod_disks(sandbox.id).exists()

    async def _open_taps(self, sandbox: Sandbox) -> list[FakeTap]:
        await self.faults.at("network.open_taps")
        opened = [FakeTap() for _ in sandbox.network.interfaces] if sandbox.network else []
        self.taps += opened
        return opened

    async def _forget(self, resource: Resource) -> None:
        await self.hypervisor.forget(resource.key)


class Pod:
    """An image pod, and what a daemon has of it now."""

    def __init__(self, bed: Bed, sandbox: Sandbox, running: ImageSandbox) -> None:
        self.bed = bed
        self.sandbox = sandbox
        self.running = running

    @property
    def agent(self) -> Any:
        return self.running.agent

    @property
    def machine(self) -> FakeMachine:
        """What the world has of the VM that was started last."""
        return self.bed.hypervisor.machines[self.sandbox.id]

    @property
    def definition_file(self) -> Path:
        return self.bed.paths.pod_disks(self.sandbox.id) / "machine.json"

    async def run(self, identifier: str = "c", **fields: Any) -> FakeMachine:
        """Create and start a container."""
        await self.agent.create(self.bed.container(identifier, **fields))
        await self.agent.start(identifier)
        return self.machine

    async def state(self) -> GuestContainerState:
        (state,) = await self.agent.containers()
        assert isinstance(state, GuestContainerState)
        return state

    async def ended(self) -> GuestContainerState:
        """Wait until the container has exited, and nothing of its machine is left."""
        async with asyncio.timeout(PATIENCE):
            await self.running.machine.ended.wait()
            while ResourceKind.PROCESS in await self.bed.kinds(self.sandbox):
                await asyncio.sleep(0.005)
        return await self.state()

    async def restart(self) -> None:
        """Have the next daemon take over."""
        await self.running.close()
        await self.adopt()

    async def adopt(self) -> None:
        self.running = await self.bed.backend().adopt(self.sandbox)

    def facts(self) -> dict[str, Any]:
        return dict(self.running.facts())


async def until(true: Callable[[], bool]) -> None:
    """Wait until something is true."""
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def open_bed() -> AsyncIterator[Bed]:
    """Yield a host with nothing; afterwards its machines end."""
    with place_of_its_own() as directory:
        base = Path(directory)
        database = StepStore(base / "db", Faults())
        await database._thread.run(database._open)
        bed = Bed(base, database)
        try:
            yield bed
        finally:
            bed.faults._orders.clear()
            await bed.hypervisor.close()
            bed.changes.close()
            await database.close()
