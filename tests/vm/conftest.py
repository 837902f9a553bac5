"""One booted guest for all tests of this folder, and a BusyBox layer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.hosts import (
    Host,
    footprint,
    make_busybox_layer,
    open_host,
    qemu_hypervisor,
    sandbox,
    short_directory,
)
from vmruntime.sandboxes.container_vm import ContainerVm


@pytest.fixture
def base() -> Iterator[Path]:
    """A short directory that unprivileged helpers can pass through."""
    with short_directory() as directory:
        yield directory


@pytest.fixture(autouse=True)
def no_leaks(base: Path) -> Iterator[None]:
    """Fail a test after which anything of its host is left."""
    with leaks.nothing_left(footprint(base)):
        yield


@pytest.fixture
async def host(base: Path) -> AsyncIterator[Host]:
    """A host with QEMU."""
    async with open_host(base, qemu_hypervisor()) as host:
        yield host


@pytest.fixture
async def guest(host: Host) -> AsyncIterator[ContainerVm]:
    """A booted guest."""
    one = sandbox("ab" * 32)
    running = await host.backend.start(one)
    yield running
    await running.close()
    await host.backend.release(one.id, final=True)


@pytest.fixture(scope="session")
def busybox_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EROFS layer with a static BusyBox."""
    return make_busybox_layer(tmp_path_factory.mktemp("layer"))
