"""What happens in a share on the host's side; the binds themselves are tried in tests/e2e/test_volumes.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmruntime.errors import FailedPrecondition
from vmruntime.volumes.share import withdraw


async def test_a_link_in_a_share_leads_nowhere(tmp_path: Path) -> None:
    root, victim = tmp_path / "share", tmp_path / "victim"
    root.mkdir()
    victim.mkdir()
    (victim / "file").write_text("kept")
    (root / "container").symlink_to(victim)
    with pytest.raises(FailedPrecondition, match="could not be emptied: Not a directory"):
        await withdraw(root, "container")
    (root / "container").unlink()
    (root / "container").mkdir()
    (root / "container" / "0").symlink_to(victim)
    await withdraw(root, "container")
    assert not (root / "container").exists()
    assert (victim / "file").read_text() == "kept"


async def test_what_is_not_ours_to_remove_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "container" / "0").mkdir(parents=True)
    (tmp_path / "container" / "0" / "file").write_text("x")
    with pytest.raises(FailedPrecondition, match="could not be emptied: Directory not empty"):
        await withdraw(tmp_path, "container")
    await withdraw(tmp_path, "unknown")
