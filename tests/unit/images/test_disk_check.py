"""Disk images, most of them hostile."""

from __future__ import annotations

import asyncio
import gzip
import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmruntime.aio import process
from vmruntime.errors import DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted
from vmruntime.images import disk_check
from vmruntime.images.disk_check import DiskInfo, check_disk
from vmruntime.images.disk_header import HEAD, BadDisk, DiskFormat, inspect

MIB = 1024 * 1024
GIB = 1024 * MIB
LIMIT = 100 * GIB


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, cwd="/")


def create(path: Path, form: str = "qcow2", size: str = "1G", *options: object) -> Path:
    qemu_img("create", "-q", "-f", form, *options, path, size)
    return path


def patched(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


def raw(path: Path, size: int = MIB) -> Path:
    path.write_bytes(bytes(510) + b"\x55\xaa" + bytes(size - 512))
    return path


async def refused(path: Path, *words: str, declared: DiskFormat | None = None) -> None:
    with pytest.raises(BadDisk) as refusal:
        await check_disk(path, max_virtual_size=LIMIT, declared=declared, name="the-image")
    text = str(refusal.value)
    assert text.startswith("the-image: ")
    assert text.endswith(")"), "no remedy"
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("qcow2", []),
        ("qcow2", ["-o", "compat=0.10"]),
        ("qcow2", ["-o", "compression_type=zstd,extended_l2=on,cluster_size=128k"]),
        ("qcow2", ["-o", "lazy_refcounts=on"]),
        ("vmdk", []),
        ("vmdk", ["-o", "subformat=streamOptimized"]),
    ],
)
async def test_good_images(tmp_path: Path, form: str, options: list[str]) -> None:
    path = create(tmp_path / "disk", form, "1G", *options)
    expected = DiskInfo(format=DiskFormat(form), virtual_size=GIB, file_size=path.stat().st_size)
    assert await check_disk(path, max_virtual_size=GIB) == expected
    assert await check_disk(path, max_virtual_size=GIB, declared=DiskFormat(form)) == expected


async def test_raw_images(tmp_path: Path) -> None:
    path = raw(tmp_path / "disk")
    expected = DiskInfo(format=DiskFormat.RAW, virtual_size=MIB, file_size=MIB)
    assert await check_disk(path, max_virtual_size=MIB) == expected
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(MIB))
    await refused(empty, "bytes 510 and 511 are not 55 AA")
    assert await check_disk(empty, max_virtual_size=MIB, declared=DiskFormat.RAW) == expected
    await refused(raw(tmp_path / "odd", MIB + 1), "has 1048577 bytes, which is no number of sectors")
    (tmp_path / "nothing").write_bytes(b"")
    await refused(tmp_path / "nothing", "is a disk without any sectors", declared=DiskFormat.RAW)


async def test_what_a_converter_makes(tmp_path: Path) -> None:
    source = raw(tmp_path / "raw", 4 * MIB)
    for form in ("qcow2", "vmdk"):
        qemu_img("convert", "-f", "raw", "-O", form, source, tmp_path / form)
        assert (await check_disk(tmp_path / form, max_virtual_size=LIMIT)).virtual_size == 4 * MIB
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", source, tmp_path / "packed")
    assert (await check_disk(tmp_path / "packed", max_virtual_size=LIMIT)).format is DiskFormat.QCOW2


async def test_backing_files(tmp_path: Path) -> None:
    base = create(tmp_path / "base")
    await refused(
        create(tmp_path / "a", "qcow2", "1G", "-b", base, "-F", "qcow2"), "has a backing file", "qemu-img convert"
    )
    create(tmp_path / "b", "qcow2", "1G", "-u", "-b", "/etc/shadow", "-F", "raw")
    await refused(tmp_path / "b", "has a backing file")
    vmdk = create(tmp_path / "base.vmdk", "vmdk")
    await refused(create(tmp_path / "c", "vmdk", "1G", "-b", vmdk, "-F", "vmdk"), "has a parent")


async def test_data_in_other_files(tmp_path: Path) -> None:
    create(tmp_path / "a", "qcow2", "1G", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
    await refused(tmp_path / "a", "keeps its data in another file")
    # The bit is cleared, the name stays.
    await refused(patched(tmp_path / "a", 72, bytes(8)), "keeps its data in another file")
    for subformat in ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        create(tmp_path / f"{subformat}.vmdk", "vmdk", "3G", "-o", f"subformat={subformat}")
        await refused(tmp_path / f"{subformat}.vmdk", "is a VMDK whose data are in other files")


async def test_a_container_of_a_descriptor(tmp_path: Path) -> None:
    """QEMU follows the descriptor in a sparse extent that has no capacity, to whatever file it names."""
    secret = raw(tmp_path / "secret")
    descriptor = b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    descriptor += b'RW 2048 FLAT "%s" 0\nddb.adapterType = "ide"\n' % bytes(secret)
    header = b"KDMV" + struct.pack("<IIQQQQ", 1, 3, 0, 128, 1, 20)
    hostile = tmp_path / "hostile.vmdk"
    hostile.write_bytes(header.ljust(512, b"\0") + descriptor.ljust(20 * 512, b"\0"))
    opened = await process.run(["qemu-img", "info", "-f", "vmdk", str(hostile)])
    assert bytes(secret) in opened.stdout, "qemu-img would have opened it"
    await refused(hostile, "is a VMDK whose data are in other files")


@pytest.mark.parametrize("kind", ["custom", "vmfs", "fullDevice", ""])
async def test_other_types_of_vmdk(tmp_path: Path, kind: str) -> None:
    path = create(tmp_path / "disk.vmdk", "vmdk")
    content = path.read_bytes().replace(b'"monolithicSparse"', f'"{kind}"'.encode().ljust(18))
    path.write_bytes(content)
    await refused(path, f"is a VMDK of type {kind!r}")


@pytest.mark.parametrize("method", [1, 2])  # AES, LUKS (docs/interop/qcow2.txt, crypt_method)
async def test_encryption(tmp_path: Path, method: int) -> None:
    await refused(patched(create(tmp_path / "a", "qcow2", "1M"), 32, struct.pack(">I", method)), "is encrypted")


async def test_luks(tmp_path: Path) -> None:
    # A header as cryptsetup writes it; qemu-img, which could make one, measures the CPU for it and fails on busy hosts.
    path = tmp_path / "b"
    path.write_bytes(b"LUKS\xba\xbe\x00\x01" + b"aes".ljust(32, b"\0") + bytes(2**20))
    await refused(path, "is encrypted by LUKS")


async def test_sizes(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "qcow2", "1T")
    with pytest.raises(ResourceExhausted, match="is a disk of 1099511627776 bytes; 107374182400 are allowed"):
        await check_disk(path, max_virtual_size=LIMIT)
    for size in (2**63, 2**64 - 1):
        await refused(patched(path, 24, struct.pack(">Q", size)), "qemu-img cannot use it")
    await refused(patched(path, 24, bytes(8)), "")
    huge_table = patched(create(tmp_path / "l1"), 36, struct.pack(">I", 2**32 - 1))
    await refused(huge_table, "qemu-img cannot use it")


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (4, struct.pack(">I", 1), "is QCOW of version 1"),
        (4, struct.pack(">I", 9), "is QCOW of version 9"),
        (60, struct.pack(">I", 65), "has 65 internal snapshots"),
        (72, struct.pack(">Q", 2), "says of itself that it is corrupt"),
        (72, struct.pack(">Q", 1 << 40), "has features of a newer QCOW2 (0x10000000000)"),
        (20, struct.pack(">I", 40), "qemu-img cannot use it"),
    ],
)
async def test_headers(tmp_path: Path, offset: int, data: bytes, words: str) -> None:
    await refused(patched(create(tmp_path / "disk"), offset, data), words)


async def test_other_things(tmp_path: Path) -> None:
    for form, words in (
        ("vdi", "a VDI image"),
        ("vhdx", "a VHDX image"),
        ("vpc", "a VHD image"),
        ("qed", "a QED image"),
    ):
        await refused(create(tmp_path / form, form, "10M"), f"is {words}", "qemu-img convert")
    for content, words in (
        (gzip.compress(b"disk"), "is packed by gzip (unpack it first)"),
        (b"\xfd7zXZ\0" + bytes(600), "is packed by xz"),
        (b"<!DOCTYPE html>\n<title>404</title>", "is a web page or another text, not a disk image (check the URL)"),
        (b'{"error": "not found"}', "is a web page"),
        (b"QFI\xfb", "ends within its header"),
        (b"QFI\xfb\0\0\0\3" + bytes(70), "ends within its header"),
        (b"KDMV" + bytes(100), "ends within its header"),
        (b"", "is no QCOW2 or VMDK image"),
        (b"COWD" + bytes(600), "is a VMDK of an old version"),
        (b"# Disk DescriptorFile\nversion=1\n", "is a VMDK whose data are in other files"),
    ):
        (tmp_path / "other").write_bytes(content)
        await refused(tmp_path / "other", words)


async def test_declared_formats(tmp_path: Path) -> None:
    """A guest with a raw disk could write a header with a backing file into it, and be given that file at its next start."""
    await refused(create(tmp_path / "a"), "is said to be raw, but is qcow2", declared=DiskFormat.RAW)
    await refused(raw(tmp_path / "b"), "is said to be qcow2, but is raw", declared=DiskFormat.QCOW2)


async def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    await refused(tmp_path / "pipe", "is not a file")
    await refused(tmp_path, "is not a file")
    (tmp_path / "link").symlink_to(create(tmp_path / "disk"))
    for name in ("link", "absent"):
        with pytest.raises(FailedPrecondition, match=f"{tmp_path / name}: cannot be read: "):
            await check_disk(tmp_path / name, max_virtual_size=LIMIT)


async def test_how_qemu_img_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "disk")
    seen: list[list[str]] = []
    real = process.run

    async def run(argv: list[str], **options: object) -> process.Completed:
        seen.append(argv)
        assert str(path) not in argv
        return await real(argv, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(process, "run", run)
    await check_disk(path, max_virtual_size=LIMIT)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(disk_check, "drop_privileges", lambda account: ["env", f"ACCOUNT={account}"])
    await check_disk(path, max_virtual_size=LIMIT, account="vmruntime")
    assert "ACCOUNT=vmruntime" in seen[1]
    for argv in seen:
        assert argv[0] == "prlimit"
        assert {"--as=1073741824", "--cpu=20", "--fsize=0"} <= set(argv)
        assert argv[argv.index("-f") + 1] == "qcow2", "qemu-img must not guess"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_as_another_account(tmp_path: Path) -> None:
    path = create(tmp_path / "disk")  # pytest's directories can be entered by us alone
    path.chmod(0o644)
    assert (await check_disk(path, max_virtual_size=LIMIT, account="nobody")).virtual_size == GIB
    path.chmod(0o600)
    with pytest.raises(FailedPrecondition, match="cannot be read by nobody"):
        await check_disk(path, max_virtual_size=LIMIT, account="nobody")


async def test_limits_of_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "disk")

    def answer(outcome: process.Completed | Exception) -> None:
        async def run(*arguments: object, **options: object) -> process.Completed:
            await asyncio.sleep(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(process, "run", run)

    def completed(returncode: int, stdout: bytes = b"", stderr: str = "") -> process.Completed:
        return process.Completed(("qemu-img",), returncode, stdout, stderr)

    for outcome, words in (
        (DeadlineExceeded("x"), "did not finish with it within 60 s"),
        (Internal("x"), "had more than 1048576 bytes to say"),
        (completed(-9), "it was ended by signal 9, at the limits of 20 s"),
        (completed(0, b"nonsense"), "in a form that is not understood"),
        (completed(0, b'{"format": "raw", "virtual-size": 1}'), "is raw to qemu-img and qcow2 by its header"),
        (completed(0, b'{"format": "qcow2", "virtual-size": 1, "backing-filename": "x"}'), "has a backing file"),
        (completed(0, b'{"format": "qcow2", "virtual-size": 1, "encrypted": true}'), "is encrypted"),
        (completed(0, b'{"format": "qcow2", "virtual-size": 1, "format-specific": {"data": {"data-file": "x"}}}'),
         "keeps its data in another file"),
        (completed(0, b'{"format": "qcow2", "virtual-size": 1, "format-specific": {"data": {"extents": [{"filename": "/x"}]}}}'),
         "keeps its data in another file"),
        (completed(0, b'{"format": "qcow2", "virtual-size": 1, "format-specific": {"data": {"corrupt": true}}}'), "corrupt"),
    ):  # fmt: skip
        answer(outcome)
        await refused(path, words)
    answer(completed(1, stderr="prlimit: failed to execute qemu-img: No such file or directory"))
    with pytest.raises(FailedPrecondition, match="'qemu-img' is not installed"):
        await check_disk(path, max_virtual_size=LIMIT)


@given(
    st.sampled_from([b"", b"QFI\xfb\0\0\0\3", b"QFI\xfb", b"KDMV", bytes(510) + b"\x55\xaa"]), st.binary(max_size=700)
)
def test_any_header_is_taken_or_refused(magic: bytes, rest: bytes) -> None:
    head = (magic + rest)[:HEAD]
    try:
        assert inspect("x", head, len(head)) in DiskFormat
    except BadDisk as error:
        assert error.remedy
