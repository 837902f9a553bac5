"""ISO images of seeds, read by pycdlib and by a reader of our own."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pycdlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.seed.iso9660 import SECTOR, volumes
from vmruntime.errors import InvalidArgument, ResourceExhausted
from vmruntime.seed.iso import iso_image, write_image

FILES = {
    "meta-data": b'{"instance-id": "x"}\n',
    "user-data": b"#cloud-config\n" * 1000,
    "network-config": b"",
    "openstack/latest/meta_data.json": b"{}",
    "openstack/latest/user_data": bytes(range(256)) * 8,
}


def test_both_readers_find_everything() -> None:
    image = iso_image(FILES, "cidata")
    for volume in volumes(image):
        assert volume.label == "cidata"
        assert volume.sectors * SECTOR == len(image)
        assert volume.files == FILES
    modes = volumes(image)[0].modes
    assert modes["meta-data"] == 0o100444
    assert modes["openstack"] == modes["openstack/latest"] == 0o040555
    reader = pycdlib.PyCdlib()
    reader.open_fp(io.BytesIO(image))
    for path, content in FILES.items():
        for kind in ("rr_path", "joliet_path"):
            out = io.BytesIO()
            reader.get_file_from_iso_fp(out, **{kind: f"/{path}"})
            assert out.getvalue() == content
    assert reader.pvd.volume_identifier.rstrip() == b"cidata"
    reader.close()


def test_the_same_bytes_at_another_time_in_another_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = iso_image(FILES, "config-2")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        later = time.time() + 86400
        monkeypatch.setattr(time, "time", lambda: later)
        assert iso_image(dict(reversed(FILES.items())), "config-2") == first
    finally:
        monkeypatch.undo()
        time.tzset()
    assert iso_image({**FILES, "meta-data": b"{}"}, "config-2") != first


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?(\.[a-z]{1,4})?", fullmatch=True), st.binary(max_size=5000), max_size=8
    )
)
def test_any_content(files: dict[str, bytes]) -> None:
    try:
        image = iso_image(files, "cidata")
    except InvalidArgument:
        # A file and a directory of one name.
        assert any(other.startswith(f"{path}/") for path in files for other in files)
    else:
        assert all(volume.files == files for volume in volumes(image))


@pytest.mark.parametrize("label", ["", "x" * 17, "né", "a\nb"])
def test_labels_that_cannot_be(label: str) -> None:
    with pytest.raises(InvalidArgument, match="label: "):
        iso_image({}, label)


@pytest.mark.parametrize("path", ["", "..", "a//b", "x" * 32, "/etc", "a\n", "etc/"])
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(InvalidArgument, match="path: "):
        iso_image({path: b""}, "cidata")


def test_a_limit() -> None:
    with pytest.raises(ResourceExhausted, match=r"have 5000 bytes; 4096 are possible \(mount large ConfigMaps"):
        iso_image({"a": bytes(5000)}, "cidata", limit=4096)
    with pytest.raises(ResourceExhausted, match="100000 are possible"):
        iso_image({f"f{i}": b"x" for i in range(100)}, "cidata", limit=100000)


def test_writing(tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    write_image(b"image", path)
    assert path.read_bytes() == b"image"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_image(b"other", path)
    assert path.read_bytes() == b"image"
    with open(tmp_path / "fd", "wb") as file:
        write_image(b"image", file.fileno())
    assert (tmp_path / "fd").read_bytes() == b"image"


def test_a_half_written_image_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_image(b"image", tmp_path / "seed.iso")
    assert list(tmp_path.iterdir()) == []
