"""Many pods at once, as after the start of a node: their guests boot a few at a time."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.hosts import open_host, sandbox, short_directory
from vmruntime.agent.fake_guest import FakeGuest
from vmruntime.agent.fake_server import BootingGuest, Machine
from vmruntime.hypervisor.errors import BootFailed
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.sources import service

SECONDS = 0.1
PODS = 7


class SlowGuest:
    """A guest that takes its time, and counts how many do."""

    booting = 0
    most = 0
    tried = 0

    def __init__(self) -> None:
        self._guest: BootingGuest | None = None
        self._dead = False

    async def boot(self, machine: Machine) -> None:
        SlowGuest.tried += 1
        SlowGuest.booting += 1
        SlowGuest.most = max(SlowGuest.most, SlowGuest.booting)
        try:
            await asyncio.sleep(SECONDS)
        finally:
            SlowGuest.booting -= 1
        if not self._dead:
            self._guest = BootingGuest(FakeGuest())
            await self._guest.boot(machine)

    async def die(self) -> None:
        self._dead = True
        if self._guest is not None:
            await self._guest.die()


@pytest.mark.parametrize("boot_timeout", [30.0, 0.5 * SECONDS])
async def test_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, boot_timeout: float) -> None:
    """Waiting for one's turn does not count; one that fails lets the next one have it."""
    monkeypatch.setattr(service, "STARTS_PER_PROCESSOR", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(SlowGuest, "most", 0)
    monkeypatch.setattr(SlowGuest, "tried", 0)
    for name in ("vmlinuz", "initramfs.img"):
        (tmp_path / name).write_bytes(b"")
    hypervisor = FakeHypervisor(lambda spec: SlowGuest())
    with short_directory() as base:
        async with open_host(
            base, hypervisor, guest=tmp_path, boot_timeout=boot_timeout, cgroups=HostCgroups([])
        ) as host:
            ones = [sandbox(f"{number:04x}{'c' * 60}") for number in range(PODS)]
            answers = await asyncio.gather(*(host.backend.start(one) for one in ones), return_exceptions=True)
            for one, answer in zip(ones, answers, strict=True):
                if isinstance(answer, BaseException):
                    assert isinstance(answer, BootFailed)
                else:
                    await answer.close()
                    await host.backend.release(one.id, final=True)
        await hypervisor.close()
    failed = [answer for answer in answers if isinstance(answer, BootFailed)]
    if boot_timeout > SECONDS:
        assert (len(failed), SlowGuest.most) == (0, 2)
    else:
        assert (len(failed), SlowGuest.tried) == (PODS, PODS)
