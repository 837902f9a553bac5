"""Archives, scratch space, policy options, layouts and pipelines."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path

import pytest

from vmruntime.aio.pipeline import in_thread, output_of
from vmruntime.errors import FailedPrecondition, Internal, InvalidArgument
from vmruntime.images import archive
from vmruntime.images.layout import Layout
from vmruntime.images.platform import host_platform
from vmruntime.images.scratch import ScratchSpace
from vmruntime.images.skopeo import policy_options


def test_archive_names() -> None:
    found = archive.parse("docker-archive:/tmp/a.tar:app:1")
    assert (found.path, found.selector) == ("/tmp/a.tar", "app:1")
    assert [str(name) for name in found.names([])] == ["docker.io/library/app:1"]
    assert [str(name) for name in found.names(["x", "y:2"])] == ["docker.io/library/x:latest", "docker.io/library/y:2"]
    with pytest.raises(InvalidArgument, match="give a name"):
        archive.parse("oci:/tmp/dir").names([])
    with pytest.raises(InvalidArgument, match="digest"):
        found.names(["x@sha256:" + "a" * 64])


@pytest.mark.parametrize("source", ["", "oci", "oci:", "oci:rel", "dir:/tmp/x", "docker://x", "oci:/a\0b"])
def test_archive_refused(source: str) -> None:
    with pytest.raises(InvalidArgument, match="source"):
        archive.parse(source)


async def test_scratch_is_private_and_goes(tmp_path: Path) -> None:
    space = ScratchSpace(tmp_path / "space")
    assert await space.sweep() == 0
    async with space.directory() as mine:
        assert stat.S_IMODE(mine.stat().st_mode) == 0o700
        (mine / "file").touch()
        (tmp_path / "space/left").mkdir()
        (tmp_path / "space/link").symlink_to(tmp_path)
        assert await space.sweep() == 2
        assert (mine / "file").exists()
    assert os.listdir(tmp_path / "space") == []
    assert tmp_path.exists()


def test_policy(tmp_path: Path) -> None:
    present, absent = tmp_path / "policy.json", tmp_path / "absent"
    present.touch()
    assert policy_options("/my/policy") == ["--policy", "/my/policy"]
    assert policy_options("", (absent, present)) == []
    assert policy_options("", (absent,)) == ["--insecure-policy"]


def test_layout_counts_what_is_there(tmp_path: Path) -> None:
    a, b, c = (f"sha256:{letter * 64}" for letter in "abc")
    layout = Layout(tmp_path / "layout")
    layout.prepare({a: 10_000_000})
    assert layout.blob(a).stat().st_size == 10_000_000
    assert layout.blob(a).stat().st_blocks == 0
    layout.blob(b).write_bytes(b"12345")
    (layout.directory / "oci-put-blob123").write_bytes(b"123")
    scan = layout.scan({b: 5, c: 9})
    assert scan.complete == {b}
    assert scan.bytes == 8
    with pytest.raises(Internal):
        layout.read("app", host_platform())


async def test_thread_is_waited_for() -> None:
    finished = False

    def work() -> None:
        nonlocal finished
        time.sleep(0.1)
        finished = True

    task = asyncio.ensure_future(in_thread(work))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished


def test_output_of(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"x" * 3_000_000)
    with open(source, "rb") as file:
        assert b"".join(output_of(["cat"], file)) == source.read_bytes()
        file.seek(1_000_000)
        assert next(output_of(["cat"], file))  # left in the middle: the program is ended with it
        with pytest.raises(Internal, match="status 4: oh"):
            list(output_of(["sh", "-c", "echo oh >&2; exit 4"], file))
        with pytest.raises(FailedPrecondition, match="no-such"):
            list(output_of(["no-such-program"], file))
