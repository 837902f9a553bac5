from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.unit.cli.fake_cri import FakeCri, FakeDaemon
from vmruntime.cli.main import main


@dataclasses.dataclass
class Cli:
    """The command, configured for directories of the test and, where one runs, the fake daemon."""

    base: Path
    daemon: FakeDaemon | None = None

    @property
    def config(self) -> Path:
        return self.base / "config.toml"

    @property
    def cri(self) -> FakeCri:
        assert self.daemon is not None
        return self.daemon.cri

    def __call__(self, *arguments: str | Path, input: str | None = None) -> Result:
        argv = ["--config", str(self.config), *(str(argument) for argument in arguments)]
        return CliRunner().invoke(main, argv, input=input)


@pytest.fixture
def offline() -> Iterator[Cli]:
    """The command without a daemon."""
    # Unix socket paths are short, and tmp_path is not.
    with tempfile.TemporaryDirectory(prefix="vmr", dir="/tmp") as name:
        base = Path(name)
        (base / "run").mkdir()
        (base / "config.toml").write_text(f'root = "{base}/root"\nrun = "{base}/run"\n')
        yield Cli(base)


@pytest.fixture
def cli(offline: Cli) -> Iterator[Cli]:
    """The command with a fake daemon."""
    daemon = FakeDaemon(offline.base / "run" / "vmruntime.sock")
    offline.daemon = daemon
    yield offline
    daemon.close()
