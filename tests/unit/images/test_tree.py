from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmruntime.errors import ResourceExhausted
from vmruntime.images import tree
from vmruntime.images.manifest import BadImage

LATER = 2**62


def test_marks() -> None:
    marks = tree.read_marks(["a", ".wh.b", ".wh..wh..opq", ".wh..wh.plnk", ".wh..hidden", "x.wh.y"])
    assert marks.gone == ["b", ".hidden"]
    assert marks.opaque
    assert marks.files == [".wh.b", ".wh..wh..opq", ".wh..wh.plnk", ".wh..hidden"]


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
def test_marks_of_nothing(name: str) -> None:
    with pytest.raises(BadImage, match="whiteout"):
        tree.read_marks([name])


def test_bookkeeping_goes_and_times_stay(tmp_path: Path) -> None:
    (tmp_path / "d/.wh..wh.plnk").mkdir(parents=True)
    (tmp_path / "d/.wh..wh.aufs").touch()
    (tmp_path / "d/file").touch()
    (tmp_path / "d/.wh.file").touch()  # the same layer brings the file back
    os.utime(tmp_path / "d", ns=(5, 5))
    tree.finish(tmp_path, 1000, LATER)
    assert os.listdir(tmp_path / "d") == ["file"]
    assert (tmp_path / "d").stat().st_mtime_ns == 5


def test_times_of_unpacking_become_the_epoch(tmp_path: Path) -> None:
    (tmp_path / "implied").mkdir()
    tree.finish(tmp_path, 1000, tmp_path.stat().st_mtime_ns - 1)
    assert (tmp_path / "implied").stat().st_mtime_ns == 0
    assert tmp_path.stat().st_mtime_ns == 0


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".wh.keep").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(".")
    tree.finish(root, 1000, LATER)
    assert os.listdir(outside) == [".wh.keep"]


def test_holes_count(tmp_path: Path) -> None:
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(600)
    os.link(tmp_path / "hole", tmp_path / "same")
    tree.finish(tmp_path, 1000, LATER)
    with open(tmp_path / "other", "wb") as file:
        file.truncate(600)
    with pytest.raises(ResourceExhausted, match="1000 bytes"):
        tree.finish(tmp_path, 1000, LATER)


def test_deep_trees(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    tree.finish(tmp_path, 1000, LATER)
