"""Disks of VMs in images from a real registry, most of them built to be refused."""

from __future__ import annotations

import asyncio
import errno
import pwd
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import registry as reg
from tests.support.image_host import NAME, Host
from tests.support.registry import BuiltLayer, Registry, build_image, files, layer, member
from vmruntime.aio.detached import drop_privileges
from vmruntime.errors import FailedPrecondition, ResourceExhausted
from vmruntime.images import container_disks
from vmruntime.images.container_disks import NoDisk
from vmruntime.images.disk_header import BadDisk
from vmruntime.model.image import DiskImage

pytestmark = pytest.mark.root

GIB = 1024**3
A, B = "disk/a.qcow2", "disk/b.qcow2"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Registry]:
    with reg.registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def host(tmp_path: Path, server: Registry) -> Host:
    return Host(tmp_path / "host", server.address, max_disk_gib=10)


def qcow2(path: Path, size: str = "1G", *options: str) -> bytes:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size], check=True)
    return path.read_bytes()


def umoci(layout: Path, source: Path, target: str) -> None:
    image, bundle = f"{layout}:image", layout.with_suffix(".bundle")
    run(["umoci", "init", "--layout", str(layout)])
    run(["umoci", "new", "--image", image])
    run(["umoci", "unpack", "--image", image, str(bundle)])
    (bundle / "rootfs" / target).parent.mkdir()
    shutil.copy(source, bundle / "rootfs" / target)
    run(["umoci", "repack", "--image", image, str(bundle)])


def run(argv: list[str]) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def loops() -> str:
    return subprocess.run(
        ["losetup", "--list", "--output", "BACK-FILE"], stdout=subprocess.PIPE, check=True
    ).stdout.decode()


def nothing_mounted(host: Host) -> bool:
    return str(host.paths.root) not in Path("/proc/mounts").read_text() + loops()


async def test_an_image_that_umoci_built(host: Host, server: Registry, tmp_path: Path) -> None:
    layout, disk = tmp_path / "layout", tmp_path / "disk.qcow2"
    content = qcow2(disk)
    umoci(layout, disk, "disk/debian.qcow2")
    server.push(layout, "app:1")
    async with host.service(account="nobody") as service:
        pulled = await service.pull(NAME)
        assert (pulled.disk, len(pulled.layers)) == (None, 1)
        answers = await asyncio.gather(*(service.vm_disk(pulled) for _ in range(5)))
        path, disk_image = answers[0]
        assert set(answers) == {answers[0]}
        assert disk_image == DiskImage(
            digest=pulled.layers[0].diff_id, format="qcow2", virtual_size=GIB, file_size=len(content)
        )
        assert path.read_bytes() == content
        assert (path.stat().st_mode & 0o777, path.stat().st_gid) == (0o640, pwd.getpwnam("nobody").pw_gid)
        image = service.status(NAME)
        assert image is not None
        assert (image.disk, image.size) == (disk_image, pulled.layers[0].size + len(content))
        assert service.fs_usage().used_bytes == image.size
        inode = path.stat().st_ino
    assert (host.leftovers(), nothing_mounted(host)) == ([], True)
    async with host.service() as service:
        assert service.status(NAME) == image
        await service.pull(NAME)
        again = service.status(NAME)
        assert again is not None
        assert (again.disk, again.size) == (image.disk, image.size)
        assert (await service.vm_disk(image))[0].stat().st_ino == inode
    path.unlink()
    async with host.service() as service:
        lost = service.status(NAME)
        assert lost is not None
        assert (lost.disk, lost.size) == (None, pulled.size)
        assert (await service.vm_disk(lost))[0].read_bytes() == content
        await service.remove(NAME)
        assert (host.layer_files(), list(host.paths.disks.iterdir())) == ([], [])


async def test_a_vms_account_reads_the_disk_and_finds_nothing_else(
    base: Path, server: Registry, tmp_path: Path
) -> None:
    server.push(build_image(tmp_path / "l", [files({A: qcow2(tmp_path / "a")})]), "app:1")
    host = Host(base / "disks", server.address)
    host.paths.root.mkdir(mode=0o711, parents=True)
    async with host.service(account="nobody") as service:
        path, _ = await service.vm_disk(await service.pull(NAME, for_vm=True))

    def as_nobody(*command: str) -> int:
        return subprocess.run([*drop_privileges("nobody"), *command], capture_output=True).returncode

    assert as_nobody("head", "-c1", str(path)) == 0
    assert as_nobody("ls", str(host.paths.disks)) != 0
    assert as_nobody("sh", "-c", f"exec 3>>{path}") != 0
    assert as_nobody("ls", str(host.paths.layers)) != 0


def stack(kind: str, a: bytes, b: bytes) -> Sequence[BuiltLayer]:
    lower = files({A: a})
    return {
        "a file of an upper layer replaces it": [lower, files({A: b})],
        "the topmost layer with a disk decides": [lower, files({B: b}), files({"etc/motd": b"hi"})],
        "a directory alone decides nothing": [files({A: b}), layer([member("disk", type=tarfile.DIRTYPE)])],
        "what is whited out is not there": [files({A: b}), files({B: a}), files({"disk/.wh.b.qcow2": b""})],
        "of two files one is whited out": [files({A: a, B: b}), files({"disk/.wh.a.qcow2": b""})],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "a file of an upper layer replaces it",
        "the topmost layer with a disk decides",
        "a directory alone decides nothing",
        "what is whited out is not there",
        "of two files one is whited out",
    ],
)
async def test_layers(kind: str, host: Host, server: Registry, tmp_path: Path) -> None:
    a, b = qcow2(tmp_path / "a"), qcow2(tmp_path / "b", "2G")
    server.push(build_image(tmp_path / "l", stack(kind, a, b)), "app:1")
    async with host.service() as service:
        path, disk = await service.vm_disk(await service.pull(NAME))
        assert (disk.virtual_size, path.read_bytes() == b) == (2 * GIB, True)


async def test_images_that_differ_in_what_they_hide(host: Host, server: Registry, tmp_path: Path) -> None:
    a, b = qcow2(tmp_path / "a"), qcow2(tmp_path / "b", "2G")
    base = files({A: a, B: b})
    for name, hidden in (("app:1", "a"), ("app:2", "b")):
        layers = [base, files({f"disk/.wh.{hidden}.qcow2": b""})]
        server.push(build_image(tmp_path / f"without-{hidden}", layers), name)
    async with host.service() as service:
        first = await service.vm_disk(await service.pull(NAME))
        second = await service.vm_disk(await service.pull("registry.example/app:2"))
        assert (first[1].virtual_size, second[1].virtual_size) == (2 * GIB, GIB)
        assert first[0] != second[0]


async def test_two_images_with_one_disk(host: Host, server: Registry, tmp_path: Path) -> None:
    base = files({A: qcow2(tmp_path / "a")})
    server.push(build_image(tmp_path / "1", [base]), "app:1")
    server.push(build_image(tmp_path / "2", [base, files({"etc/motd": b"hi"})]), "app:2")
    async with host.service() as service:
        first, second = await service.pull(NAME, for_vm=True), await service.pull("registry.example/app:2", for_vm=True)
        await service.remove(first.id)
        (file,) = host.paths.disks.iterdir()
        assert (await service.vm_disk(second))[0] == file
        await service.remove(second.id)
        assert list(host.paths.disks.iterdir()) == []


async def test_holes_stay_holes(host: Host, server: Registry, tmp_path: Path) -> None:
    size = 300 * 1024**2 + 512
    content = bytes(510) + b"\x55\xaa" + bytes(size - 1024) + b"\x01" * 512
    server.push(build_image(tmp_path / "l", [files({"disk/disk.img": content})]), "app:1")
    async with host.service() as service:
        path, disk = await service.vm_disk(await service.pull(NAME))
        assert (disk.format, disk.virtual_size, path.read_bytes() == content) == ("raw", size, True)
        assert path.stat().st_blocks * 512 < 1024**2


def special(**fields: Any) -> BuiltLayer:
    return layer([member("disk", type=tarfile.DIRTYPE), member("disk/a", **fields)])


def bad(kind: str, tmp_path: Path) -> tuple[Sequence[BuiltLayer], type[Exception], str]:
    """Return layers, the error and its words."""
    a = qcow2(tmp_path / "a")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1024**2))
    backed = qcow2(tmp_path / "backed", "1G", "-b", str(secret), "-F", "raw")
    whited = [files({A: a}), files({".wh.disk": b""})]
    opaque = [files({A: a}), files({"disk/.wh..wh..opq": b""})]
    link = [files({"x/a.qcow2": a}), layer([member("disk", type=tarfile.SYMTYPE, linkname="x")])]
    none = r"has nothing in /disk/ \(an image pod needs .*leave out vmruntime\.io/kind"
    return {
        "no /disk": ([files({"bin/sh": b"x"})], NoDisk, none),
        "no layers with files": ([layer([])], NoDisk, none),
        "removed": (whited, NoDisk, none),
        "opaque": (opaque, NoDisk, none),
        "backing file": ([files({A: backed})], BadDisk, r"/disk/a\.qcow2: has a backing file"),
        "absurd size": ([files({A: qcow2(tmp_path / "huge", "1000T")})], ResourceExhausted, "are allowed"),
        "two files": ([files({A: a, B: a})], BadDisk, r"has 2 files in /disk/: a\.qcow2, b\.qcow2 \(an image pod"),
        "many files": ([files({f"disk/{n}": b"" for n in range(200)})], BadDisk, "more than 100 files"),
        "symlink": ([special(type=tarfile.SYMTYPE, linkname="/etc/shadow")], BadDisk, "/disk/a is not a regular"),
        "device": ([special(type=tarfile.BLKTYPE, devmajor=7, devminor=0)], BadDisk, "/disk/a is not a regular"),
        "pipe": ([special(type=tarfile.FIFOTYPE)], BadDisk, "/disk/a is not a regular"),
        "directory": ([special(type=tarfile.DIRTYPE)], BadDisk, "/disk/a is not a regular"),
        "link for /disk": (link, BadDisk, "/disk is not a directory"),
        "file for /disk": ([files({"disk": a})], BadDisk, "/disk is not a directory"),
        "no disk": ([files({"disk/readme": b"# hello\n" * 100})], BadDisk, "could be booted"),
        "hostile name": ([files({"disk/\x1b]0;x\n": b"x"})], BadDisk, r"/disk/'\\x1b\]0;x\\n'"),
        "name that is no text": ([layer([member("disk/\udcff\udcfe", b"x" * 512)])], BadDisk, r"/disk/'\\udcff"),
    }[kind]


BAD = [
    *(
        "no /disk",
        "no layers with files",
        "removed",
        "opaque",
        "backing file",
        "absurd size",
        "two files",
        "many files",
    ),
    *("symlink", "device", "pipe", "directory", "link for /disk", "file for /disk", "no disk", "hostile name"),
    "name that is no text",
]


@pytest.mark.parametrize("kind", BAD)
async def test_refused_when_it_is_pulled_for_an_image_pod(
    kind: str, host: Host, server: Registry, tmp_path: Path
) -> None:
    layers, error, words = bad(kind, tmp_path)
    server.push(build_image(tmp_path / "l", layers), "app:1")
    async with host.service() as service:
        with pytest.raises(error, match=words) as refusal:
            await service.pull(NAME, for_vm=True)
        assert str(refusal.value).startswith(NAME)
        str(refusal.value).encode()  # what gRPC sends
        assert list(host.paths.disks.iterdir()) == []
        await service.pull(NAME)  # ordinary pods may have it
    assert (host.leftovers(), nothing_mounted(host)) == ([], True)


async def test_a_full_disk(host: Host, server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.push(build_image(tmp_path / "l", [files({A: qcow2(tmp_path / "a")})]), "app:1")

    def full(source: int, target: int) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with host.service() as service:
        image = await service.pull(NAME)
        with monkeypatch.context() as patch:
            patch.setattr(container_disks, "_copy_piece", full)
            with pytest.raises(ResourceExhausted, match="no space left in .*/incoming for its disk"):
                await service.vm_disk(image)
        assert (host.leftovers(), list(host.paths.disks.iterdir())) == ([], [])
        await service.vm_disk(image)


async def test_one_caller_goes_and_another_stays(
    host: Host, server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, copying = container_disks._copy_piece, threading.Event()

    def slow(source: int, target: int) -> bool:
        copying.set()
        time.sleep(0.3)
        return copy(source, target)

    async def begun() -> None:
        assert await asyncio.to_thread(copying.wait, 20)
        copying.clear()

    monkeypatch.setattr(container_disks, "_copy_piece", slow)
    server.push(build_image(tmp_path / "l", [files({A: qcow2(tmp_path / "a")})]), "app:1")
    async with host.service() as service:
        image = await service.pull(NAME)
        first, second = (asyncio.ensure_future(service.vm_disk(image)) for _ in range(2))
        await begun()
        first.cancel()
        path, _ = await second
        assert path.exists()
        with pytest.raises(asyncio.CancelledError):
            await first
        await service.remove(NAME)
        copying.clear()
        lonely = asyncio.ensure_future(service.vm_disk(await service.pull(NAME)))
        await begun()
        lonely.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lonely
    assert (host.leftovers(), nothing_mounted(host)) == ([], True)


async def test_layers_that_cannot_be_mounted(host: Host, server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [files({A: qcow2(tmp_path / "a")})]), "app:1")
    async with host.service() as service:
        image = await service.pull(NAME)
        service.layer_path(image.layers[0]).write_bytes(bytes(8192))
        with pytest.raises(FailedPrecondition, match="cannot be looked into: mount: (?s:.*)erofs and loop modules"):
            await service.vm_disk(image)
