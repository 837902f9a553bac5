from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog

from tests.unit.pods.bed import Daemon, daemon_on, place_of_its_own
from vmruntime.pods import sandbox_stop, vm_end


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Drawing what thousands of ordered failures have to say takes longer than the tests."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most containers here have no handler for SIGTERM, and most guests that do not answer go on living."""
    monkeypatch.setattr(sandbox_stop, "CONTAINER_GRACE", 0.02)
    monkeypatch.setattr(vm_end, "MOMENT", 0.1)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with place_of_its_own() as directory:
        yield Path(directory)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with daemon_on(tmp_path) as daemon:
        yield daemon


@pytest.fixture
async def pod(daemon: Daemon) -> str:
    return await daemon.run_pod()
