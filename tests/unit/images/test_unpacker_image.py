"""Images are read by fsck.erofs here; tests/e2e/test_images_unpacking.py has the kernel read them."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import tarfile
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.registry import make_tar, member
from vmruntime.images.unpacker.blob import CheckedTar
from vmruntime.images.unpacker.main import run, unpack
from vmruntime.images.unpacker.problems import BadLayer, TooLarge

IDENTITY = uuid.UUID(int=7)
Members = list[tuple[tarfile.TarInfo, bytes]]


def build(image: Path, members: Members, limit: int = 1 << 30) -> Path:
    data = make_tar(members)
    checked = CheckedTar(io.BytesIO(data), f"sha256:{hashlib.sha256(data).hexdigest()}", limit)  # type: ignore[arg-type]
    image.unlink(missing_ok=True)
    descriptor = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        unpack(checked, descriptor, IDENTITY.bytes, limit)
    finally:
        os.close(descriptor)
    return image


def extract(image: Path, target: Path) -> dict[str, bytes]:
    """Return the content of each file and the target of each link, as fsck.erofs finds them."""
    subprocess.run(
        ["fsck.erofs", f"--extract={target}", "--no-preserve-owner", "--overwrite", str(image)],
        check=True,
        capture_output=True,
    )
    found = {}
    for directory, _, names in os.walk(target):
        for name in names:
            path = Path(directory, name)
            found[str(path.relative_to(target))] = (
                os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
            )
    return found


@pytest.mark.parametrize("size", [0, 1, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 1 << 20, (1 << 20) + 17])
def test_sizes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    image = build(tmp_path / "i", [member("before", b"b"), member("a", content), member("after", b"c")])
    assert extract(image, tmp_path / "out") == {"before": b"b", "a": content, "after": b"c"}


def test_many_names_in_one_directory(tmp_path: Path) -> None:
    names = {f"{number:x}".rjust(number % 250 + 1, "."): b"%d" % number for number in range(1, 700)}
    image = build(tmp_path / "i", [member(name, content) for name, content in names.items() if name not in (".", "..")])
    assert extract(image, tmp_path / "out") == names


def test_many_directories(tmp_path: Path) -> None:
    names = {f"d{number}/{'n' * (number % 200)}x": b"%d" % number for number in range(500)}
    names["/".join("abcdefgh" * 20)] = b"deep"
    image = build(tmp_path / "i", [member(name, content) for name, content in names.items()])
    assert extract(image, tmp_path / "out") == names


def test_many_inodes(tmp_path: Path) -> None:
    """More than are written at once, with content of every length between them."""
    names = {f"{number % 7}/{number}": os.urandom(number * 37 % 9000) for number in range(1500)}
    image = build(tmp_path / "i", [member(name, content) for name, content in names.items()])
    assert extract(image, tmp_path / "out") == names


NAMES = st.lists(st.sampled_from(["a", "b", "ü", "c" * 255, "-", "."]), min_size=1, max_size=4).map("/".join)
CONTENT = st.binary(max_size=40) | st.integers(0, 20_000).map(lambda size: os.urandom(size))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(st.lists(st.tuples(NAMES, CONTENT), max_size=12))
def test_any_tree(tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, bytes]]) -> None:
    """Of what is accepted, the last of each name is there."""
    tmp_path = tmp_path_factory.mktemp("any")
    expected: dict[str, bytes] = {}
    for name, content in files:
        plain = "/".join(part for part in name.split("/") if part != ".")
        expected = {key: value for key, value in expected.items() if not f"{key}/".startswith(f"{plain}/")}
        expected[plain] = content
    try:
        image = build(tmp_path / "i", [member(name, content) for name, content in files])
    except BadLayer:
        return
    assert extract(image, tmp_path / "out") == expected


def test_the_same_layer_gives_the_same_bytes(tmp_path: Path) -> None:
    members = [member("d/a", b"x" * 5000), member("d/.wh.b"), member("c", type=tarfile.SYMTYPE, linkname="d")]
    one, two = build(tmp_path / "1", members), build(tmp_path / "2", members)
    assert one.read_bytes() == two.read_bytes()
    assert IDENTITY.bytes in one.read_bytes()[1024:1152]
    assert one.stat().st_size % 4096 == 0


def test_nothing_at_all(tmp_path: Path) -> None:
    assert extract(build(tmp_path / "i", []), tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([member("l", type=tarfile.SYMTYPE, linkname="")], "link to a name of 0 bytes"),
        ([member("l", type=tarfile.SYMTYPE, linkname="x" * 4096)], "link to a name of 4096 bytes"),
        ([member("d", type=tarfile.CHRTYPE, devmajor=4096, devminor=1)], "device 4096:1"),
        ([member("a", pax_headers={"SCHILY.xattr.user.x": "v" * 65536})], "too long"),
        ([member("a", pax_headers={f"SCHILY.xattr.user.{n}": "v" * 30_000 for n in range(3)})], "too long"),
        ([member("a", pax_headers={"SCHILY.xattr.user." + "n" * 251: "v"})], "too long"),
        ([member("a", pax_headers={"SCHILY.xattr.user.": "v"})], "too long"),
        ([member("./", type=tarfile.DIRTYPE, pax_headers={"SCHILY.xattr.user.x": "v" * 3000})], "more attributes"),
    ],
)
def test_what_is_refused(tmp_path: Path, members: Members, text: str) -> None:
    with pytest.raises(BadLayer, match=text):
        build(tmp_path / "i", members)


def test_files_together_have_a_limit(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="more than 50000 bytes"):
        build(tmp_path / "i", [member("a", b"x" * 60_000)], limit=50_000)


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    data = make_tar([member("a", b"x" * 3_000_000)])
    (tmp_path / "blob").write_bytes(data)
    blob = os.open(tmp_path / "blob", os.O_RDONLY)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        outcome = run(blob, full, f"sha256:{hashlib.sha256(data).hexdigest()}", str(IDENTITY), "9999999")
    finally:
        os.close(full)
    assert outcome["problem"] == "full"
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
