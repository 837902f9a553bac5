"""Unit tests show what code does, not what is left on a disk after a power cut: none of them waits for the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from vmruntime.store import database

# A busy machine takes longer than hypothesis has patience.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def durability() -> Iterator[str]:
    """Yield how the store waits elsewhere."""
    used = database.SYNCHRONOUS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses the same descriptors
        patch.setattr(database, "SYNCHRONOUS", "OFF")
        yield used
