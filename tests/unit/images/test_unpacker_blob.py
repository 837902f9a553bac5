from __future__ import annotations

import gzip
import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.registry import zstd
from vmruntime.images.unpacker.blob import CheckedTar, Compression, ahead, detect
from vmruntime.images.unpacker.problems import BadLayer, TooLarge


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def unpack(tmp_path: Path, blob: bytes, diff_id: str, limit: int = 1 << 30) -> bytes:
    path = tmp_path / "blob"
    path.write_bytes(blob)
    with open(path, "rb", buffering=0) as file:
        return b"".join(CheckedTar(file, diff_id, limit))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=5000), max_size=5), st.integers(0, 600))
def test_gzip_members_and_padding(tmp_path: Path, parts: list[bytes], padding: int) -> None:
    data = b"".join(parts)
    blob = b"".join(gzip.compress(part) for part in parts) + b"\0" * padding if parts else gzip.compress(b"")
    assert unpack(tmp_path, blob, digest(data)) == data


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_001])
def test_each_compression(tmp_path: Path, size: int) -> None:
    data = b"t" + os.urandom(size)
    for blob in (data, gzip.compress(data), zstd(data)):
        assert unpack(tmp_path, blob, digest(data)) == data


def test_many_small_members_straddle_reads(tmp_path: Path) -> None:
    parts = [os.urandom(777) for _ in range(400)]
    assert unpack(tmp_path, b"".join(map(gzip.compress, parts)), digest(b"".join(parts))) == b"".join(parts)


def test_wrong_digest(tmp_path: Path) -> None:
    with pytest.raises(BadLayer, match="corrupt"):
        unpack(tmp_path, gzip.compress(b"data"), digest(b"other"))


@pytest.mark.parametrize(
    "blob",
    [
        gzip.compress(b"data" * 1000)[:-6],
        gzip.compress(b"data") + b"garbage",
        gzip.compress(b"data")[:-8] + b"\1" * 8,
        zstd(b"data" * 1000)[:-3],
        b"BZh91AY&SY",
        b"\xfd7zXZ\x00\x00",
    ],
    ids=["cut", "garbage", "checksum", "zstd-cut", "bzip2", "xz"],
)
def test_damaged(tmp_path: Path, blob: bytes) -> None:
    with pytest.raises(BadLayer, match=r"corrupt|compressed with"):
        unpack(tmp_path, blob, digest(b"data"))


def test_bomb_is_stopped_at_the_limit(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, wbits=31)
    blob = b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(64)) + packer.flush()
    path = tmp_path / "blob"
    path.write_bytes(blob)
    with open(path, "rb", buffering=0) as file:
        tar = CheckedTar(file, digest(b""), 5_000_000)
        with pytest.raises(TooLarge, match="5000000 bytes"):
            list(tar)
    assert tar.size <= 5_000_000 + (1 << 20)


def test_what_runs_ahead_stops_with_its_reader() -> None:
    given = []

    def chunks() -> Iterator[bytes]:
        for number in range(1000):
            given.append(number)
            yield b"x"

    before = threading.active_count()
    source = ahead(chunks(), 3)
    assert next(source) == b"x"
    source.close()
    assert len(given) < 20
    assert threading.active_count() == before


def test_what_runs_ahead_fails_in_its_reader() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise BadLayer("oh")

    source = ahead(chunks(), 3)
    assert next(source) == b"x"
    with pytest.raises(BadLayer, match="oh"):
        next(source)


def test_detection() -> None:
    assert detect(b"") is Compression.NONE
    assert detect(b"\x1f\x8b\x08") is Compression.GZIP
