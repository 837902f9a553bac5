"""What every sandbox backend does: container VMs over the fake hypervisor, and over QEMU with the real guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from tests.support import leaks
from tests.support.hosts import (
    GUEST,
    Host,
    footprint,
    make_busybox_layer,
    open_host,
    qemu_hypervisor,
    sandbox,
    short_directory,
)
from vmruntime.agent.errors import AgentGone
from vmruntime.agent.fake_guest import FakeGuest
from vmruntime.agent.fake_server import BootingGuest
from vmruntime.aio.detached import DetachedProcess
from vmruntime.errors import FailedPrecondition, InvalidArgument, VmruntimeError
from vmruntime.hypervisor.errors import BootFailed, VmGone
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.hypervisor.interface import Hypervisor
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import Sandbox
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.interface import LayerDisk, RunningSandbox
from vmruntime.sandboxes.ledger import process_identity

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE = 60.0


class Bed:
    """A host with a backend, and what sandboxes of it use.

    Attributes:
        host: Its ledger has nothing before and after each test.
        layer: The image of a layer.
        broken: A host whose guest never comes up.
    """

    def __init__(self, host: Host, layer: Path, broken: Host) -> None:
        self.host = host
        self.layer = layer
        self.broken = broken
        self._number = 0

    def sandbox(self) -> Sandbox:
        self._number += 1
        # Directories are named after the first digits of an id.
        return sandbox(f"{self._number:04x}{'c' * 60}")

    async def processes(self, one: Sandbox) -> list[DetachedProcess]:
        owned = await self.host.owned.ledger.owned_by(one.id)
        return [DetachedProcess(process_identity(r)) for r in owned if r.kind is ResourceKind.PROCESS]

    async def nothing_left(self, one: Sandbox, host: Host | None = None) -> None:
        paths = (host or self.host).paths
        assert await (host or self.host).owned.ledger.owned_by(one.id) == []
        assert not paths.sandbox(one.id).exists()
        assert not paths.pod_disks(one.id).exists()

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[tuple[Sandbox, RunningSandbox]]:
        """Start a sandbox; afterwards it is released and nothing of it is left."""
        one = self.sandbox()
        running = await self.host.backend.start(one)
        try:
            yield one, running
        finally:
            await running.close()
            await self.host.backend.release(one.id, final=True)
        await self.nothing_left(one)


@contextlib.asynccontextmanager
async def fake(base: Path) -> AsyncIterator[Bed]:
    guest = base / "guest"
    guest.mkdir()
    for name in ("vmlinuz", "initramfs.img"):
        (guest / name).write_bytes(b"")
    (base / "layer.img").write_bytes(b"\0" * 4096)
    hypervisor = FakeHypervisor(lambda spec: BootingGuest(FakeGuest()))
    dead = FakeHypervisor(lambda spec: DeadGuest())
    async with beds(base, hypervisor, guest, dead, guest, base / "layer.img", HostCgroups([])) as bed:
        yield bed
    await hypervisor.close()
    await dead.close()


class DeadGuest:
    """A kernel that panics."""

    async def boot(self, machine: object) -> None:
        machine.say("Kernel panic - not syncing: VFS: Unable to mount root fs")  # type: ignore[attr-defined]
        machine.power_off("the guest's kernel panicked")  # type: ignore[attr-defined]

    async def die(self) -> None:
        return


@contextlib.asynccontextmanager
async def qemu(base: Path) -> AsyncIterator[Bed]:
    broken = base / "broken"
    broken.mkdir()
    (broken / "vmlinuz").write_bytes((GUEST / "vmlinuz").read_bytes())
    (broken / "initramfs.img").write_bytes(b"garbage")
    hypervisor = qemu_hypervisor()
    layer = make_busybox_layer(base)
    with leaks.nothing_left(footprint(base)):
        async with beds(base, hypervisor, GUEST, hypervisor, broken, layer, HostCgroups.detect()) as bed:
            yield bed


@contextlib.asynccontextmanager
async def beds(
    base: Path, good: Hypervisor, guest: Path, bad: Hypervisor, broken: Path, layer: Path, cgroups: HostCgroups
) -> AsyncIterator[Bed]:
    async with open_host(base, good, guest=guest, cgroups=cgroups) as host:
        other = Host(base, host.database, bad, guest=broken, boot_timeout=30, cgroups=cgroups)
        yield Bed(host, layer, other)


IMPLEMENTATIONS = [
    pytest.param(fake, id="container-fake"),
    pytest.param(qemu, id="container-qemu", marks=pytest.mark.vm),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=IMPLEMENTATIONS)
async def bed(request: pytest.FixtureRequest) -> AsyncIterator[Bed]:
    """A host for the module."""
    with short_directory() as directory:
        async with request.param(directory) as bed:
            yield bed


async def test_a_started_sandbox_answers_and_is_released(bed: Bed) -> None:
    async with bed.started() as (one, running):
        assert running.hello.sandbox_id == ""
        assert (await running.agent.hello()).version == running.hello.version
        assert running.scratch_serial
        assert set(running.phases) >= {"prepare", "qemu", "guest"}
        processes = await bed.processes(one)
        assert [process.alive for process in processes] == [True] * len(processes) != []
        ending = asyncio.ensure_future(running.wait())
        await bed.host.backend.release(one.id, final=False)
        async with asyncio.timeout(PATIENCE):
            assert await ending
        assert [process.alive for process in processes] == [False] * len(processes)
        assert bed.host.paths.sandbox(one.id).is_dir(), "the console stays readable until the pod is removed"
        with pytest.raises(AgentGone):
            async with asyncio.timeout(PATIENCE):
                await running.agent.hello()
        await bed.host.backend.release(one.id, final=True)
        await bed.host.backend.release(one.id, final=True)  # again: success


async def test_the_guest_powers_off_when_it_is_asked(bed: Bed) -> None:
    async with bed.started() as (one, running):
        processes = await bed.processes(one)
        ending = asyncio.ensure_future(running.wait())
        await running.shut_down(5.0)
        assert "powered off" in await ending
        assert not any(process.alive for process in processes)
        await running.shut_down(1.0)  # again: success


async def test_layers_are_attached_once(bed: Bed) -> None:
    async with bed.started() as (_, running):
        layers = [LayerDisk(path=bed.layer, serial=letter * 32) for letter in "ab"]
        await running.attach_layers(layers[:1])
        await running.attach_layers(layers)
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(running.attach_layers(layers))
        await running.release_layers([layer.serial for layer in layers])
        await running.release_layers([layers[0].serial, "unknown"])
        await running.attach_layers(layers)
        missing = LayerDisk(path=Path("/nonexistent.erofs"), serial="d" * 32)
        with pytest.raises(VmruntimeError, match=r"nonexistent\.erofs"):
            await running.attach_layers([missing])
        await running.attach_layers([LayerDisk(path=bed.layer, serial=missing.serial)])


async def test_a_later_daemon_adopts(bed: Bed) -> None:
    async with bed.started() as (one, running):
        layer = LayerDisk(path=bed.layer, serial="a" * 32)
        await running.attach_layers([layer])
        await running.close()
        again = await bed.host.backend.adopt(one)
        assert again.hello.kernel == running.hello.kernel
        await again.attach_layers([layer])  # it knows that the layer is there
        await again.release_layers([layer.serial])
        await again.close()
        await (await bed.host.backend.adopt(one)).close()


async def test_what_died_cannot_be_adopted(bed: Bed) -> None:
    async with bed.started() as (one, running):
        await running.close()
        for process in await bed.processes(one):
            os.kill(process.identity.pid, signal.SIGKILL)
            await process.wait()
        with pytest.raises(VmGone):
            await bed.host.backend.adopt(one)
    with pytest.raises(VmGone):
        await bed.host.backend.adopt(bed.sandbox())


async def test_a_guest_that_does_not_come_up_shows_its_console(bed: Bed) -> None:
    one = bed.sandbox()
    with pytest.raises(BootFailed, match=r"(?s)did not come up: .*console said.*panic"):
        await bed.broken.backend.start(one)
    await bed.nothing_left(one, bed.broken)


async def test_without_a_guest_nothing_is_made(bed: Bed, base: Path) -> None:
    one = bed.sandbox()
    host = Host(base, bed.host.database, bed.host.hypervisor, guest=base / "no-guest")
    with pytest.raises(FailedPrecondition, match="make guest"):
        await host.backend.start(one)
    await bed.nothing_left(one)


async def test_a_pod_larger_than_the_host_is_refused(bed: Bed) -> None:
    one = bed.sandbox()
    huge = msgspec.structs.replace(one.spec, resources=LinuxResources(memory_limit=1 << 50))
    one = msgspec.structs.replace(one, spec=huge)
    with pytest.raises(InvalidArgument, match="memory_limit_in_bytes"):
        bed.host.backend.size(one)
    with pytest.raises(InvalidArgument, match="memory_limit_in_bytes"):
        await bed.host.backend.start(one)
    await bed.nothing_left(one)


async def test_a_cancelled_start_leaves_nothing(bed: Bed) -> None:
    for moment in (0.0, 0.02, 0.1, 0.4):
        one = bed.sandbox()
        starting = asyncio.ensure_future(bed.host.backend.start(one))
        await asyncio.sleep(moment)
        starting.cancel()
        try:
            running = await starting
        except asyncio.CancelledError:
            pass
        else:
            await running.close()
            await bed.host.backend.release(one.id, final=True)
        await bed.nothing_left(one)


async def test_sandboxes_at_once(bed: Bed) -> None:
    sandboxes = [bed.sandbox() for _ in range(3)]
    running = await asyncio.gather(*(bed.host.backend.start(one) for one in sandboxes))
    cids = [r.key for r in await bed.host.owned.ledger.all() if r.kind is ResourceKind.CID]
    assert len(set(cids)) == len(sandboxes)
    for vm in running:
        await vm.close()
    await asyncio.gather(*(bed.host.backend.release(one.id, final=True) for one in sandboxes))
    for one in sandboxes:
        await bed.nothing_left(one)
