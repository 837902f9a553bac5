from __future__ import annotations

import contextlib
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.registry import member
from vmruntime.images.unpacker.problems import BadLayer
from vmruntime.images.unpacker.tar import HARD_LINK, Member, Source, Tar

Format = Literal[0, 1, 2]
FORMATS: list[Format] = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def archive(form: Format, *members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for info, content in members:
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pieces(data: bytes, size: int = 700) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def read(data: bytes, size: int = 700) -> list[tuple[Member, bytes]]:
    """Return the members, with their content, of a tar that comes in pieces."""
    tar = Tar(Source(pieces(data, size)))
    found = []
    for one in tar:
        content = b"".join(bytes(piece) for piece in tar.content()) if one.kind == stat.S_IFREG else b""
        found.append((one, content))
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_kinds(form: Format) -> None:
    given = [
        member("d/", type=tarfile.DIRTYPE, mode=0o1777),
        member("d/file", b"x" * 1300, uid=1000, gid=2000, mode=0o4755),
        member("d/link", type=tarfile.SYMTYPE, linkname="../x"),
        member("d/hard", type=tarfile.LNKTYPE, linkname="d/file"),
        member("d/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("d/disk", type=tarfile.BLKTYPE, devmajor=8, devminor=70000),
        member("d/pipe", type=tarfile.FIFOTYPE),
        member("d/old", b"y", type=tarfile.AREGTYPE),
        member("e/", type=tarfile.AREGTYPE),
    ]
    found = read(archive(form, *given))
    kinds = [stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, HARD_LINK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO]
    assert [one.kind for one, _ in found] == [*kinds, stat.S_IFREG, stat.S_IFDIR]
    directory, file = found[0][0], found[1][0]
    assert (directory.path.rstrip(b"/"), directory.mode) == (b"d", 0o1777)
    assert (file.path, file.mode, file.uid, file.gid, file.size) == (b"d/file", 0o4755, 1000, 2000, 1300)
    assert (file.mtime, file.mtime_ns) == (1_000_000_000, 0)
    assert found[1][1] == b"x" * 1300
    assert (found[2][0].link, found[3][0].link) == (b"../x", b"d/file")
    assert [(one.major, one.minor) for one, _ in found[4:6]] == [(1, 3), (8, 70000)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_does_not_fit_into_a_header(form: Format) -> None:
    long = "d" * 90 + "/" + "f" * 200
    info, content = member(long, b"x", uid=2**31, gid=2**31 + 1, mtime=2**40)
    link = member("ü" * 90, type=tarfile.SYMTYPE, linkname="t" * 150)
    ((one, _), (two, _)) = read(archive(form, (info, content), link))
    assert (one.path, one.uid, one.gid, one.mtime) == (long.encode(), 2**31, 2**31 + 1, 2**40)
    assert (two.path, two.link) == (("ü" * 90).encode(), b"t" * 150)


def test_prefixes() -> None:
    long = "/".join(["d" * 40] * 4)
    ((one, _),) = read(archive(tarfile.USTAR_FORMAT, member(long)))
    assert one.path == long.encode()
    # star's form has other times where the end of POSIX's prefix is.
    data = bytearray(archive(tarfile.USTAR_FORMAT, member(long)))
    data[476:500] = b"14000000000\x00" * 2
    data[508:512] = b"tar\0"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    assert read(bytes(data))[0][0].path == long.encode()


def test_extended_records() -> None:
    records = {"SCHILY.xattr.user.note": "a\nb=c", "mtime": "-1.25", "comment": "x", "SCHILY.xattr.user.none": ""}
    given = [member("a", pax_headers=records), member("b", pax_headers={"mtime": "7.5"}), member("c")]
    (a, _), (b, _), (c, _) = read(archive(tarfile.PAX_FORMAT, *given))
    assert a.xattrs == {b"user.note": b"a\nb=c"}
    assert (a.mtime, a.mtime_ns) == (-2, 750_000_000)
    assert (b.mtime, b.mtime_ns, b.xattrs) == (7, 500_000_000, {})
    assert c.mtime == 1_000_000_000


def test_global_records() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"uid": "77"}) as file:
        file.addfile(member("a")[0])
        file.addfile(member("b", pax_headers={"uid": "78"})[0])
    assert [one.uid for one, _ in read(buffer.getvalue())] == [77, 78]


@pytest.mark.parametrize(
    "options", [["--format=gnu"], *(["--format=pax", f"--sparse-version={n}"] for n in ("0.0", "0.1", "1.0"))]
)
@pytest.mark.parametrize("parts", [[], [(0, 5)], [(1 << 20, 70_000)], [(n << 16, 4096 + n) for n in range(1, 60)]])
def test_sparse_files(tmp_path: Path, options: list[str], parts: list[tuple[int, int]]) -> None:
    size = 5_000_000
    with open(tmp_path / "hole", "wb") as file:
        for offset, length in parts:
            os.pwrite(file.fileno(), os.urandom(length), offset)
        file.truncate(size)
    (tmp_path / "next").write_bytes(b"after it")
    argv = ["tar", "-cS", *options, "-C", str(tmp_path), "hole", "next"]
    data = subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout
    assert len(data) < size
    (hole, content), (_, after) = read(data)
    assert (hole.path, hole.size) == (b"hole", size)
    assert content == (tmp_path / "hole").read_bytes()
    assert after == b"after it"


def test_ends() -> None:
    data = archive(tarfile.USTAR_FORMAT, member("a", b"x"))
    assert [one.path for one, _ in read(data[:1024])] == [b"a"]  # without the blocks of zeros
    assert [one.path for one, _ in read(data[:1536] + b"garbage" * 100)] == [b"a"]
    assert read(b"") == []
    for cut in (1, 511, 513, 1023):
        with pytest.raises(BadLayer, match="ends in the middle"):
            read(data[:cut])


def _changed(at: int, value: bytes, kind: bytes = b"0") -> bytes:
    data = bytearray(archive(tarfile.USTAR_FORMAT, member("a", b"x")))
    data[156:157] = kind
    data[at : at + len(value)] = value
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    return bytes(data)


def _record(**records: Any) -> bytes:
    return archive(tarfile.PAX_FORMAT, member("a", b"x", pax_headers=records))


SPARSE = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1"}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x" * 512, "checksum"),
        (_changed(124, b"-0000000001\0"), "size"),
        (_changed(124, b"0000_000001\0"), "size"),
        (_changed(124, b"\xff" * 12), "size -1"),
        (_changed(124, b"\x80" + b"\x7f" * 11), "size"),
        (_changed(108, b"\x80\x00\x00\x00\xff\xff\xff\xff"), "out of range"),
        (_changed(156, b"M", b"M"), "unknown type 'M'"),
        (_changed(124, b"00010000001\0", b"x"), "header of 2097153 bytes"),
        (_changed(124, b"00000000001\0", b"x"), "extended record"),
        (_record(comment="x" * 30).replace(b" comment", b"_comment"), "extended record"),
        (_record(comment="x").replace(b"13 comment", b"99 comment"), "extended record"),
        (_record(mtime="soon"), "time"),
        (_record(uid="-1"), "uid"),
        (_record(**SPARSE), "sparse in an unknown way"),
        (_record(**SPARSE, **{"GNU.sparse.map": "0,1,2"}), "half a pair"),
        (_record(**SPARSE, **{"GNU.sparse.map": "0,2", "GNU.sparse.size": "9"}), "as long as"),
        (_record(**SPARSE, **{"GNU.sparse.map": "9,1", "GNU.sparse.size": "9"}), "not within"),
        (_record(**SPARSE, **{"GNU.sparse.map": "5,1,2,0", "GNU.sparse.size": "9"}), "one after the other"),
        (_record(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), "longer than its content"),
    ],
)
def test_bad_tars(data: bytes, text: str) -> None:
    with pytest.raises(BadLayer, match=text):
        read(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_noise_is_refused_or_read(data: st.DataObject) -> None:
    """Whatever is in a tar, nothing but BadLayer comes of it."""
    good = bytearray(_record(**{"SCHILY.xattr.user.a": "b", "mtime": "5.5"}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, 2559))] = data.draw(st.integers(0, 255))
    for at in range(0, 2048, 512):
        if data.draw(st.booleans()):
            good[at + 148 : at + 156] = b"%06o\0 " % (sum(good[at : at + 148]) + 256 + sum(good[at + 156 : at + 512]))
    with contextlib.suppress(BadLayer):
        read(bytes(good))
