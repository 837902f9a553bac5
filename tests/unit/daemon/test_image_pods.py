"""Who runs image pods: by settings, by what is installed, and by what runs already."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tests.support.fake_daemon import fake_parts
from tests.support.fakes import FakeClock, FakeNetwork
from vmruntime.config.settings import Settings
from vmruntime.daemon.image_pods import Host, image_backend
from vmruntime.errors import FailedPrecondition, Internal
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.paths import Paths
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.store.database import Database
from vmruntime.store.records import Ledger

UUID = "6f0d2c1e-0000-4000-8000-000000000001"


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    database = await Database.open(tmp_path / "db")
    parts = fake_parts()
    assert parts.hypervisor is not None
    yield Host(
        settings=with_driver("qemu"),
        paths=Paths(tmp_path / "root", tmp_path / "run"),
        owned=OwnedResources(Ledger(database), HostCgroups([])),
        network=FakeNetwork(),
        clock=FakeClock(),
        qemu=parts.hypervisor,
        memory_mib=8192,
    )
    await database.close()


@pytest.fixture
async def stack() -> AsyncIterator[contextlib.AsyncExitStack]:
    async with contextlib.AsyncExitStack() as stack:
        yield stack


def with_driver(name: str) -> Settings:
    settings = Settings()
    hypervisor = msgspec.structs.replace(settings.hypervisor, image_pods=name)
    return msgspec.structs.replace(settings, hypervisor=hypervisor)


async def note(host: Host, driver: str) -> None:
    """Write down a machine of an earlier daemon."""
    resource = Resource(owner="pod", kind=ResourceKind.MACHINE, key=UUID, data={"driver": driver})
    await host.owned.ledger.record(resource)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without libvirt's library."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libvirt" else found(name))


@pytest.mark.usefixtures("no_library")
async def test_without_libvirts_library_qemu_runs_them(host: Host, stack: contextlib.AsyncExitStack) -> None:
    automatic = Host(**{**vars(host), "settings": with_driver("auto")})
    backend = await image_backend(automatic, stack)
    assert backend.driver == "qemu"


@pytest.mark.usefixtures("no_library")
async def test_machines_of_libvirt_are_not_given_up(host: Host, stack: contextlib.AsyncExitStack) -> None:
    await note(host, "libvirt")
    with pytest.raises(FailedPrecondition, match="run under libvirt, which cannot be used.*no library"):
        await image_backend(host, stack)


async def test_libvirt_is_not_asked_for_what_nobody_needs(host: Host, stack: contextlib.AsyncExitStack) -> None:
    wanted = Host(**{**vars(host), "settings": with_driver("libvirt")})
    backend = await image_backend(wanted, stack)
    await backend.sweep(set())
    assert backend.driver == "libvirt"
    assert not (host.paths.run / "libvirt").exists()


async def test_a_machine_of_a_driver_that_is_gone_stays_in_the_ledger(
    host: Host, stack: contextlib.AsyncExitStack
) -> None:
    await image_backend(host, stack)
    await note(host, "other")
    with pytest.raises(Internal, match="the driver other"):
        await host.owned.release("pod")
    assert len(await host.owned.ledger.all()) == 1


async def test_a_machine_is_released_by_its_own_driver(host: Host, stack: contextlib.AsyncExitStack) -> None:
    await image_backend(host, stack)
    await note(host, "qemu")
    await host.owned.release("pod")
    assert await host.owned.ledger.all() == []
