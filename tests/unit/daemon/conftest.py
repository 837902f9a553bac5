"""What a daemon in this process needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import structlog

from tests.support.fake_daemon import fake_parts
from tests.support.hosts import short_directory
from vmruntime.config.settings import GuestSettings, LogSettings, Settings
from vmruntime.daemon.parts import Parts
from vmruntime.hypervisor.fake import FakeHypervisor


@pytest.fixture(autouse=True)
def logging_ends_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A daemon sets up logging for its whole process; here that is undone, so that other tests see what is logged."""
    configure = structlog.configure

    def without_cache(**options: Any) -> None:
        configure(**{**options, "cache_logger_on_first_use": False})

    monkeypatch.setattr(structlog, "configure", without_cache)
    yield
    structlog.reset_defaults()


@pytest.fixture
def settings() -> Iterator[Settings]:
    with short_directory() as base:
        (base / "guest").mkdir()
        for name in ("vmlinuz", "initramfs.img"):
            (base / "guest" / name).write_bytes(b"")
        yield Settings(
            root=str(base / "root"),
            run=str(base / "run"),
            guest=GuestSettings(directory=str(base / "guest")),
            log=LogSettings(level="error"),
        )


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    parts = fake_parts()
    yield parts
    assert isinstance(parts.hypervisor, FakeHypervisor)
    await parts.hypervisor.close()
