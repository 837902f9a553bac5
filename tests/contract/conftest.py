"""What the suites share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import short_directory


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A directory for a module's own files; each implementation has another one."""
    with short_directory() as directory:
        yield directory
