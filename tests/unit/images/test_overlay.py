from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.images.overlay import make_overlay

GIB = 1024**3


def info(path: Path) -> dict[str, Any]:
    argv = ["qemu-img", "info", "--output=json", str(path)]
    found: dict[str, Any] = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
    return found


def make_base(path: Path, size: str = "1G") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), size], check=True)
    return path


@pytest.mark.parametrize(
    ("size", "seen"), [(0, GIB), (1, GIB), (GIB - 1, GIB), (3 * GIB, 3 * GIB), (GIB + 1, GIB + 512)]
)
async def test_size_grows_and_never_shrinks(tmp_path: Path, size: int, seen: int) -> None:
    base, path = make_base(tmp_path / "base"), tmp_path / "root.qcow2"
    await make_overlay(path, base, "qcow2", GIB, size, "")
    found = info(path)
    assert (found["format"], found["virtual-size"]) == ("qcow2", seen)
    assert (found["backing-filename"], found["backing-filename-format"]) == (str(base), "qcow2")
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["base", "root.qcow2", "root.qcow2.base"]


async def test_kept_on_the_same_base_and_made_anew_on_another(tmp_path: Path) -> None:
    base, other, path = make_base(tmp_path / "base"), make_base(tmp_path / "other", "2G"), tmp_path / "root.qcow2"
    await make_overlay(path, base, "qcow2", GIB, 0, "")
    first = path.stat().st_ino
    await make_overlay(path, base, "qcow2", GIB, 3 * GIB, "")
    assert path.stat().st_ino == first
    await make_overlay(path, other, "qcow2", 2 * GIB, 0, "")
    assert (info(path)["backing-filename"], info(path)["virtual-size"]) == (str(other), 2 * GIB)


@pytest.mark.parametrize("record", [None, b"{", b'{"path": "/else", "format": "raw", "virtual_size": 1}'])
async def test_one_that_was_not_recorded_is_no_overlay(tmp_path: Path, record: bytes | None) -> None:
    base, path = make_base(tmp_path / "base"), tmp_path / "root.qcow2"
    path.write_bytes(b"half")
    (tmp_path / ".root.qcow2.new").write_bytes(b"half")
    if record is not None:
        (tmp_path / "root.qcow2.base").write_bytes(record)
    await make_overlay(path, base, "qcow2", GIB, 0, "")
    assert info(path)["virtual-size"] == GIB


async def test_a_record_without_its_overlay(tmp_path: Path) -> None:
    base, path = make_base(tmp_path / "base"), tmp_path / "root.qcow2"
    await make_overlay(path, base, "qcow2", GIB, 0, "")
    path.unlink()
    await make_overlay(path, base, "qcow2", GIB, 0, "")
    assert info(path)["virtual-size"] == GIB


async def test_names_that_look_like_something_else(tmp_path: Path) -> None:
    base, path = tmp_path / "json:{}", tmp_path / "nbd:x,y=z"
    await make_overlay(path, base, "raw", GIB, 0, "")
    assert path.exists()


async def test_failures(tmp_path: Path) -> None:
    path = tmp_path / "root.qcow2"
    await make_overlay(path, tmp_path / "base", "raw", GIB, 2**50, "")
    path.unlink()
    with pytest.raises(InvalidArgument, match="a root disk of 1125899906843136 bytes cannot be made .*at most"):
        await make_overlay(path, tmp_path / "base", "raw", GIB, 2**50 + 1, "")
    with pytest.raises(FailedPrecondition, match="root.qcow2: cannot be made"):
        await make_overlay(tmp_path / "none" / "root.qcow2", tmp_path / "base", "raw", GIB, 0, "")
    assert [each.name for each in tmp_path.iterdir()] == ["root.qcow2.base"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
async def test_belongs_to_the_account(tmp_path: Path) -> None:
    path = tmp_path / "root.qcow2"
    await make_overlay(path, tmp_path / "base", "raw", GIB, 0, "nobody")
    assert (path.stat().st_uid, (tmp_path / "root.qcow2.base").stat().st_uid) == (65534, 0)
