"""Where guests come from: which source is taken, what happens when it is of no use, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.support.fakes import FakeSpareTap
from tests.support.hosts import Host, open_host, sandbox, short_directory
from vmruntime.agent.fake_guest import FakeGuest
from vmruntime.agent.fake_server import BootingGuest
from vmruntime.aio.faults import Faults
from vmruntime.config.settings import StartSettings
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import SandboxMetadata, SandboxSpec
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.container_vm import ContainerVm
from vmruntime.sandboxes.sources import budget, build, library, pace, warm

PATIENCE = 20.0
SPEC = SandboxSpec(metadata=SandboxMetadata(name="p", uid="u", namespace="n"))


class Bed:
    """A host over the fake hypervisor."""

    def __init__(self, host: Host, hypervisor: FakeHypervisor, taps: list[FakeSpareTap]) -> None:
        self.host = host
        self.hypervisor = hypervisor
        self.taps = taps
        self._number = 0

    async def start(self, memory_mib: int = 0) -> ContainerVm:
        """Start a pod as the use case does."""
        self._number += 1
        spec = SPEC
        if memory_mib:
            limit = LinuxResources(memory_limit=(memory_mib - 96) << 20)
            spec = SandboxSpec(metadata=SPEC.metadata, resources=limit)
        owner = self.host.backend.claim(spec) or f"{self._number:04x}{'c' * 60}"
        tap = await self.host.backend.tap(owner)
        try:
            return await self.host.backend.start(sandbox(owner, spec))
        finally:
            if tap is not None:
                tap.close()

    async def end(self, running: ContainerVm) -> None:
        """End a pod."""
        owner = running._vm.handle.id
        await running.close()
        await self.host.backend.release(owner, final=True)
        assert await self.host.owned.ledger.owned_by(owner) == []

    async def until(self, state: Callable[[dict[str, object]], bool]) -> None:
        """Wait for a state of the backend."""
        async with asyncio.timeout(PATIENCE):
            while not state(self.host.backend.start_state()):
                await asyncio.sleep(0.01)

    async def template(self, memory_mib: int = 512) -> None:
        """Wait for a template that is on the disk as well."""
        directory = self.host.paths.templates

        def saved(state: dict[str, object]) -> bool:
            return any(not one.name.startswith("new-") for one in directory.glob("*"))

        await self.until(saved)
        await self.until(lambda state: state["templates"].get(str(memory_mib)) == "ready")  # type: ignore[attr-defined]

    async def warm(self, number: int) -> None:
        """Wait for warm VMs."""
        await self.until(lambda state: state["warm"] == number)


@contextlib.asynccontextmanager
async def opened(base: Path, start: StartSettings, faults: Faults | None = None) -> AsyncIterator[Bed]:
    guest = base / "guest"
    guest.mkdir(exist_ok=True)
    for name in ("vmlinuz", "initramfs.img"):
        (guest / name).write_bytes(b"")
    hypervisor = FakeHypervisor(lambda spec: BootingGuest(FakeGuest()), faults)
    hypervisor.frozen_shape = "shape"
    taps: list[FakeSpareTap] = []

    async def new_tap() -> FakeSpareTap:
        taps.append(FakeSpareTap())
        taps[-1].make()
        return taps[-1]

    async with open_host(base, hypervisor, guest=guest, cgroups=HostCgroups([]), start=start, new_tap=new_tap) as host:
        await host.backend.open()
        yield Bed(host, hypervisor, taps)
    await hypervisor.close()
    assert [tap for tap in taps if tap.fd >= 0] == []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the sake of a busy host here, and the host has memory."""
    monkeypatch.setattr(build, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(pace, "PAUSE", 0.0)
    monkeypatch.setattr(warm, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(warm, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(warm, "memory_available", lambda: 0.9)


TEMPLATE = StartSettings(source="template")
WARM = StartSettings(source="auto", warm=2)


async def test_the_first_pod_boots_and_the_next_comes_from_the_template() -> None:
    with short_directory() as base:
        faults = Faults()
        frozen = faults.hold("vm.freeze")
        async with opened(base, TEMPLATE, faults=faults) as bed:
            first = await bed.start()
            assert first.source == "cold"
            frozen.release()
            await bed.template()
            second = await bed.start()
            assert second.source == "template"
            machine = bed.hypervisor.machines[second._vm.handle.id]
            assert list(machine.nics) == ["first"]
            assert set(machine.disks) == {"scratch"}
            for one in (first, second):
                await bed.end(one)


async def test_a_later_daemon_finds_the_template() -> None:
    with short_directory() as base:
        async with opened(base, TEMPLATE) as bed:
            await bed.template()
            (kept,) = (base / "root" / "templates").iterdir()
            assert sorted(one.name for one in kept.iterdir()) == ["memory", "scratch", "state", "template.json"]
        async with opened(base, TEMPLATE) as bed:
            await bed.template()
            assert bed.hypervisor.machines == {}  # nothing was booted for it


@pytest.mark.parametrize("damage", ["cut", "changed", "state", "about", "missing", "scratch"])
async def test_a_template_file_that_is_not_as_it_was_is_made_anew(damage: str) -> None:
    with short_directory() as base:
        async with opened(base, TEMPLATE) as bed:
            await bed.template()
            (directory,) = (base / "root" / "templates").iterdir()
            match damage:
                case "cut":
                    os.truncate(directory / "memory", 100)
                case "changed":
                    with (directory / "memory").open("r+b") as file:
                        file.write(b"other")
                case "state":
                    (directory / "state").write_bytes(b"another guest")
                case "about":
                    (directory / "template.json").write_text('{"shape": ')
                case "scratch":
                    with (directory / "scratch").open("r+b") as file:
                        file.seek(1 << 20)
                        file.write(b"not ours")
                case "missing":
                    (directory / "memory").unlink()
            running = await bed.start()  # what is in memory is not touched by it
            assert running.source == "template"
            await bed.end(running)
        async with opened(base, TEMPLATE) as bed:
            await bed.template()
            assert len(bed.hypervisor.machines) == 1
            running = await bed.start()
            assert running.source == "template"
            await bed.end(running)


async def test_another_guest_or_qemu_makes_another_template() -> None:
    with short_directory() as base:
        async with opened(base, TEMPLATE) as bed:
            await bed.template()
            (before,) = (base / "root" / "templates").iterdir()
            bed.hypervisor.frozen_shape = "newer"
            running = await bed.start()
            assert running.source == "cold"
            await bed.until(lambda state: [*before.parent.glob("[0-9a-f]*")] not in ([], [before]))
            await bed.template()
            assert before not in before.parent.iterdir()
            await bed.end(running)


async def test_a_guest_that_cannot_be_brought_back_boots_and_its_template_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with short_directory() as base:
        async with opened(base, TEMPLATE) as bed:
            await bed.template()
            bed.hypervisor.faults.fail("vm.thaw", HypervisorError("no"), times=2)
            for _ in range(2):
                running = await bed.start()
                assert running.source == "cold"
                await bed.end(running)
            state = bed.host.backend.start_state()["templates"]
            assert state == {"512": "failed: no"}
            assert list((base / "root" / "templates").iterdir()) == []
            monkeypatch.setattr(library, "RETRY_SECONDS", 0.0)
            await bed.end(await bed.start())
            await bed.template()


async def test_nothing_is_made_in_advance_where_all_guests_boot() -> None:
    with short_directory() as base:
        async with opened(base, StartSettings(source="cold")) as bed:
            running = await bed.start()
            assert running.source == "cold"
            assert bed.host.backend.start_state() == {"templates": {}, "warm": 0}
            assert len(bed.hypervisor.machines) == 1
            await bed.end(running)


async def test_sizes_share_a_template_and_grow() -> None:
    with short_directory() as base:
        async with opened(base, TEMPLATE) as bed:
            await bed.end(await bed.start(700))
            await bed.template(512)
            running = await bed.start(700)
            assert running.source == "template"
            machine = bed.hypervisor.machines[running._vm.handle.id]
            assert (machine.spec.size.memory_mib, machine.size.memory_mib) == (512, 700)
            await bed.end(running)


async def test_a_guest_that_cannot_grow_is_replaced_by_one_that_boots_as_large() -> None:
    with short_directory() as base:
        async with opened(base, TEMPLATE) as bed:
            await bed.template(512)
            bed.hypervisor.faults.fail("vm.resize", HypervisorError("no room for processors"))
            running = await bed.start(700)
            assert running.source == "cold"
            assert bed.hypervisor.machines[running._vm.handle.id].spec.size.memory_mib == 700
            await bed.end(running)


async def test_the_pool_outlives_whatever_goes_wrong() -> None:
    with short_directory() as base:
        faults = Faults()
        async with opened(base, WARM, faults=faults) as bed:
            faults.fail("vm.start", OSError(24, "Too many open files"), skip=1)  # after that of the template
            await bed.warm(2)
            await bed.host.backend.close()
            assert await bed.host.owned.ledger.all() == []


async def test_warm_vms_wait_and_are_made_again() -> None:
    with short_directory() as base:
        async with opened(base, WARM) as bed:
            await bed.warm(2)
            spares = [one for one in await bed.host.owned.ledger.all() if one.kind is ResourceKind.SPARE]
            assert len(spares) == 2
            running = await bed.start()
            assert running.source == "warm"
            owner = running._vm.handle.id
            assert owner in {one.owner for one in spares}
            kinds = {one.kind for one in await bed.host.owned.ledger.owned_by(owner)}
            assert ResourceKind.SPARE not in kinds
            await bed.warm(2)
            await bed.end(running)


@pytest.mark.parametrize("when", ["waiting", "claimed", "taken"])
async def test_a_warm_vm_that_dies(when: str) -> None:
    with short_directory() as base:
        async with opened(base, WARM) as bed:
            await bed.warm(2)
            if when == "waiting":
                for machine in list(bed.hypervisor.machines.values()):
                    if not machine.ended:
                        await machine.lose()
                await bed.until(lambda state: state["warm"] == 0)
                await bed.warm(2)
                running = await bed.start()
                assert running.source == "warm"
                await bed.end(running)
                return
            owner = bed.host.backend.claim(SPEC)
            assert owner is not None
            tap = await bed.host.backend.tap(owner)
            assert tap is not None
            if when == "claimed":
                await bed.hypervisor.machines[owner].lose()
                await asyncio.sleep(0.05)
            else:
                bed.hypervisor.faults.fail("rpc.Hello", HypervisorError("gone"))
                await bed.hypervisor.machines[owner].lose()
            running = await bed.host.backend.start(sandbox(owner, SPEC))
            tap.close()
            assert running.source == "template"
            assert running._vm.handle.id == owner
            await bed.end(running)


async def test_a_pod_that_does_not_come_leaves_no_warm_vm_behind() -> None:
    with short_directory() as base:
        async with opened(base, WARM) as bed:
            await bed.warm(2)
            owner = bed.host.backend.claim(SPEC)
            assert owner is not None
            await bed.host.backend.drop(owner)
            await bed.host.owned.release(owner)
            assert await bed.host.owned.ledger.owned_by(owner) == []
            await bed.warm(2)


async def test_no_vm_waits_while_the_host_is_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with short_directory() as base:
        async with opened(base, WARM) as bed:
            await bed.warm(2)
            monkeypatch.setattr(warm, "memory_available", lambda: 0.05)
            await bed.warm(0)
            running = await bed.start()
            assert running.source == "template"
            await bed.end(running)
            monkeypatch.setattr(warm, "memory_available", lambda: 0.12)
            await asyncio.sleep(0.2)
            assert bed.host.backend.start_state()["warm"] == 0
            monkeypatch.setattr(warm, "memory_available", lambda: 0.5)
            await bed.warm(2)


def test_how_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert budget.warm_vms("auto", 24 * 1024) == 2
    assert budget.warm_vms("auto", 4096) == 0
    assert budget.warm_vms(7, 4096) == 7
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert budget.warm_vms("auto", 512 * 1024) == 4
    assert 0 < budget.memory_available() <= 1
