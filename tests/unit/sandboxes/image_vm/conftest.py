"""Fixtures of the tests of image pods."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.fakes import without_qemu_img
from tests.unit.sandboxes.image_vm.bed import Bed, Pod, open_bed


@pytest.fixture(autouse=True)
def no_qemu_img(monkeypatch: pytest.MonkeyPatch) -> None:
    without_qemu_img(monkeypatch)


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    async with open_bed() as bed:
        yield bed


@pytest.fixture
async def pod(bed: Bed) -> AsyncIterator[Pod]:
    async with bed.started() as pod:
        yield pod
