from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmruntime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, ResourceExhausted
from vmruntime.images.convert import convert
from vmruntime.images.disk_check import check_disk
from vmruntime.images.disk_header import BadDisk, DiskFormat

MIB = 1024 * 1024
LIMIT = 1024 * MIB
CONTENT = bytes(510) + b"\x55\xaa" + bytes(2 * MIB - 1024) + b"end." * 128


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.img"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize(
    ("form", "compress"),
    [("qcow2", False), ("qcow2", True), ("raw", False), ("vmdk", False), ("vmdk", True)],
)
async def test_there_and_back(source: Path, tmp_path: Path, form: str, compress: bool) -> None:
    target, back = tmp_path / f"a,b={form}", tmp_path / "back"
    await convert(source, target, DiskFormat(form), compress=compress, max_virtual_size=LIMIT)
    info = await check_disk(target, max_virtual_size=LIMIT)
    assert (info.format.value, info.virtual_size) == (form, len(CONTENT))
    await convert(target, back, DiskFormat.RAW, compress=False, max_virtual_size=LIMIT)
    assert back.read_bytes() == CONTENT
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture
def hostile(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "hostile"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(source), "-F", "raw", str(path)]
    subprocess.run(argv, check=True)
    return path


async def test_refused(source: Path, hostile: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for path, limit, error in ((hostile, LIMIT, BadDisk), (source, MIB, ResourceExhausted)):
        with pytest.raises(error):
            await convert(path, target, DiskFormat.RAW, compress=False, max_virtual_size=limit)
    with pytest.raises(InvalidArgument, match="leave out --compress"):
        await convert(source, target, DiskFormat.RAW, compress=True, max_virtual_size=LIMIT)
    with pytest.raises(AlreadyExists, match="hostile: is there already"):
        await convert(source, hostile, DiskFormat.RAW, compress=False, max_virtual_size=LIMIT)
    with pytest.raises(FailedPrecondition, match="cannot be converted"):
        await convert(source, tmp_path / "none" / "x", DiskFormat.QCOW2, compress=False, max_virtual_size=LIMIT)
    with pytest.raises(FailedPrecondition, match="nothing: cannot be read"):
        await convert(tmp_path / "nothing", target, DiskFormat.QCOW2, compress=False, max_virtual_size=LIMIT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile", "source.img"]
