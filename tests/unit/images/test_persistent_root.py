"""Root disks on volumes: on files here, on loop devices where root may make them."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.images import persistent_root
from vmruntime.images.persistent_root import OURS, prepare
from vmruntime.model.image import DiskImage

MIB = 1024 * 1024
SIZE = 16 * MIB
DIGEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def run(argv: list[str]) -> None:
    subprocess.run(argv, check=True)


class Bed:
    """An image that has something at its beginning and end, and a volume that may be written over."""

    def __init__(self, root: Path) -> None:
        self.content = b"boot" * 1024 + bytes(SIZE - 8192) + b"last" * 1024
        raw, self.path = root / "raw", root / "disk.qcow2"
        raw.write_bytes(self.content)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(self.path)], check=True)
        self.disk = DiskImage(digest=DIGEST, format="qcow2", virtual_size=SIZE, file_size=self.path.stat().st_size)
        self.volume = root / "volume"
        self.volume.write_bytes(bytes(20 * MIB))

    async def prepare(self, image: str = DIGEST) -> int:
        return await prepare(self.volume, self.path, self.disk, image)

    async def refused(self, words: str, error: type[Exception] = FailedPrecondition, image: str = DIGEST) -> None:
        before = self.volume.read_bytes()
        with pytest.raises(error, match=words):
            await self.prepare(image)
        assert self.volume.read_bytes() == before, "it was touched"

    def write(self, place: int, data: bytes) -> None:
        with self.volume.open("r+b") as file:
            file.seek(place)
            file.write(data)


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


async def test_written_once(bed: Bed) -> None:
    assert await bed.prepare() == 20 * MIB - OURS
    assert bed.volume.read_bytes()[:SIZE] == bed.content
    bed.write(100, b"the guest's")
    assert await bed.prepare() == 20 * MIB - OURS
    assert bed.volume.read_bytes()[100:111] == b"the guest's"


async def test_another_image_is_never_written_over(bed: Bed) -> None:
    await bed.prepare()
    await bed.refused(f"made from the image {DIGEST}, not from {OTHER}, .*use another volume", image=OTHER)


async def test_interrupted(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cut(*_: object) -> None:
        bed.write(0, b"half")
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(persistent_root, "_convert", cut)
        with pytest.raises(asyncio.CancelledError):
            await bed.prepare()
    await bed.refused("not from", image=OTHER)
    await bed.prepare()
    assert bed.volume.read_bytes()[:SIZE] == bed.content


@pytest.mark.parametrize("place", [0, 4096, MIB - 1, 19 * MIB, 20 * MIB - 1])
async def test_what_is_not_blank_is_left_alone(bed: Bed, place: int) -> None:
    bed.write(place, b"x")
    await bed.refused("is not blank, .*empty it")


async def test_a_file_system_is_left_alone(bed: Bed) -> None:
    run(["mkfs.ext4", "-q", "-F", str(bed.volume)])
    await bed.refused("is not blank")


async def test_what_only_blkid_finds(bed: Bed) -> None:
    bed.write(MIB, b"\x0d\xd0\x01\xc0")  # VMFS, which begins behind the first MiB
    await bed.refused("is not blank")


async def test_damaged_trailer(bed: Bed) -> None:
    await bed.prepare()
    for place in (19 * MIB + 20, 19 * MIB + 40):
        before = bed.volume.read_bytes()
        bed.write(place, b"\xff")
        await bed.refused("is damaged, or of a newer vmruntime")
        bed.volume.write_bytes(before)
    assert await bed.prepare() == 20 * MIB - OURS


@pytest.mark.parametrize("size", [0, MIB, 10 * MIB, SIZE + OURS - 1])
async def test_too_small(bed: Bed, size: int) -> None:
    os.truncate(bed.volume, size)
    await bed.refused("the volume: .* has .* bytes.*use a larger volume", InvalidArgument)


async def test_just_large_enough(bed: Bed) -> None:
    os.truncate(bed.volume, SIZE + OURS)
    assert await bed.prepare() == SIZE
    assert bed.volume.read_bytes()[:SIZE] == bed.content


async def test_no_volume(bed: Bed, tmp_path: Path) -> None:
    bed.volume = tmp_path / "none"
    with pytest.raises(FailedPrecondition, match="none: cannot be used: No such file"):
        await bed.prepare()
    bed.volume = tmp_path
    with pytest.raises(InvalidArgument, match="neither a block device nor a file"):
        await bed.prepare()


async def test_an_image_that_fails_is_written_again(bed: Bed) -> None:
    good = bed.path.read_bytes()
    bed.path.write_bytes(b"QFI\xfb" + bytes(1000))
    with pytest.raises(FailedPrecondition, match="the image cannot be written to it"):
        await bed.prepare()
    bed.path.write_bytes(good)
    await bed.prepare()
    assert bed.volume.read_bytes()[:SIZE] == bed.content


@pytest.fixture
def loop(bed: Bed) -> Iterator[Path]:
    argv = ["losetup", "--find", "--show", str(bed.volume)]
    device = subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout.decode().strip()
    yield Path(device)
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.root
async def test_block_device(bed: Bed, loop: Path, tmp_path: Path) -> None:
    os.chmod(bed.path, 0o644)
    node = tmp_path / "node"
    os.mknod(node, 0o600 | 0o060000, loop.stat().st_rdev)
    os.chown(node, 65534, 65534)
    assert await prepare(node, bed.path, bed.disk, DIGEST, account="nobody") == 20 * MIB - OURS
    assert loop.read_bytes()[:SIZE] == bed.content
    assert await prepare(loop, bed.path, bed.disk, DIGEST) == 20 * MIB - OURS
    with pytest.raises(FailedPrecondition, match="not from"):
        await prepare(loop, bed.path, bed.disk, OTHER)


@pytest.mark.root
async def test_block_device_in_use(bed: Bed, loop: Path, tmp_path: Path) -> None:
    run(["mkfs.ext4", "-q", str(loop)])
    target = tmp_path / "mnt"
    target.mkdir()
    run(["mount", str(loop), str(target)])
    try:
        with pytest.raises(FailedPrecondition, match="is in use on the host: mounted"):
            await prepare(loop, bed.path, bed.disk, DIGEST)
    finally:
        run(["umount", str(target)])
    with pytest.raises(FailedPrecondition, match="is not blank"):
        await prepare(loop, bed.path, bed.disk, DIGEST)
