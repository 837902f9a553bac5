"""Directories for work in progress: private, and gone afterwards whatever happens."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from secrets import token_hex

from vmruntime.aio.pipeline import in_thread


class ScratchSpace:
    """A directory whose children each belong to one piece of work of this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._active: set[str] = set()

    @contextlib.asynccontextmanager
    async def directory(self) -> AsyncIterator[Path]:
        """Yield a new directory that only this user can enter; it is removed at the end."""
        path = self._directory / token_hex(8)
        self._active.add(path.name)
        try:
            await in_thread(lambda: self._make(path))
            yield path
        finally:
            try:
                await in_thread(lambda: shutil.rmtree(path, ignore_errors=True))
            finally:
                self._active.discard(path.name)

    async def sweep(self) -> int:
        """Remove what a crash left behind and return how many children that were."""
        active = frozenset(self._active)
        return await in_thread(lambda: self._sweep(active))

    def _make(self, path: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(mode=0o700)

    def _sweep(self, active: frozenset[str]) -> int:
        if not self._directory.is_dir():
            return 0
        left = [path for path in self._directory.iterdir() if path.name not in active]
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return len(left)
