"""Volumes of image pods: what is shared, what is copied, what is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vmruntime.errors import InvalidArgument, NotFound
from vmruntime.model.container import Mount
from vmruntime.model.image_pod import DataSource, SourceKind
from vmruntime.sandboxes.image_vm.volumes import COPY_LIMIT, FILE_LIMIT, SHARE_PATH, guest_volumes, source_content


def atomic(directory: Path, **content: bytes) -> Path:
    """Make a volume as kubelet writes ConfigMaps: files behind one link that is swapped."""
    (directory / "..2026").mkdir(parents=True)
    (directory / "..data").symlink_to("..2026")
    for name, data in content.items():
        (directory / "..2026" / name).write_bytes(data)
        (directory / name).symlink_to(f"..data/{name}")
    return directory


def mount(path: Path, target: str, **fields: object) -> Mount:
    return Mount(container_path=target, host_path=str(path), **fields)  # type: ignore[arg-type]


async def test_directories_are_bound_out_of_the_share_in_their_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    found = await guest_volumes("cid", [mount(first, "/data/a"), mount(second, "/data/b")], chown=False)
    assert [(one.fstype, one.source, one.path) for one in found.mounts] == [
        ("virtiofs", "vmruntime", SHARE_PATH),
        ("none", f"{SHARE_PATH}/cid/0", "/data/a"),
        ("none", f"{SHARE_PATH}/cid/1", "/data/b"),
    ]
    assert all("nofail" in one.options for one in found.mounts)
    assert [one.host_path for one in found.shared] == [str(first), str(second)]
    assert found.files == []


async def test_no_share_without_directories(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("127.0.0.1 localhost\n")
    file.chmod(0o640)
    found = await guest_volumes("cid", [mount(file, "/etc/hosts")], chown=False)
    assert (found.mounts, found.shared) == ([], [])
    assert [(one.path, one.content, one.mode, one.covered) for one in found.files] == [
        ("/etc/hosts", b"127.0.0.1 localhost\n", 0o640, False)
    ]


async def test_what_kubelet_wrote_is_copied_below_the_mount(tmp_path: Path) -> None:
    volume = atomic(tmp_path / "settings", level=b"one\n")
    found = await guest_volumes("cid", [mount(volume, "/etc/settings", readonly=True)], chown=False)
    assert len(found.shared) == 1
    assert [(one.path, one.content, one.covered) for one in found.files] == [("/etc/settings/level", b"one\n", True)]


async def test_a_large_volume_is_shared_only(tmp_path: Path) -> None:
    volume = atomic(tmp_path / "large", a=b"x" * COPY_LIMIT, b=b"x")
    found = await guest_volumes("cid", [mount(volume, "/large")], chown=False)
    assert (len(found.shared), found.files) == (1, [])


async def test_a_termination_log_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.touch()
    found = await guest_volumes("cid", [mount(file, "/dev/termination-log")], chown=False)
    assert (found.mounts, found.files) == ([], [])


async def test_large_files_sockets_and_images_are_refused(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"x" * (FILE_LIMIT + 1))
    with pytest.raises(InvalidArgument, match=r"config\.mounts\[0\]\.host_path.*1048577 bytes"):
        await guest_volumes("cid", [mount(large, "/x")], chown=False)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(InvalidArgument, match="neither a directory nor a file"):
            await guest_volumes("cid", [mount(tmp_path / "s", "/run/docker.sock")], chown=False)
    with pytest.raises(InvalidArgument, match=r"config\.mounts\[0\]\.image"):
        await guest_volumes("cid", [Mount(container_path="/i", image="busybox")], chown=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")
async def test_only_writable_volumes_of_kubelet_are_given_to_root(tmp_path: Path) -> None:
    ours = tmp_path / "kubernetes.io~empty-dir" / "data"
    readonly = tmp_path / "kubernetes.io~csi" / "data"
    host = tmp_path / "srv"
    outside = tmp_path / "outside"
    for directory in (ours, readonly, host):
        directory.mkdir(parents=True)
        (directory / "file").touch()
    outside.touch()
    (ours / "link").symlink_to(outside)
    for path in (ours, ours / "file", readonly / "file", host / "file", outside):
        os.chown(path, 1000, 1000)
    mounts = [mount(ours, "/a"), mount(readonly, "/b", readonly=True), mount(host, "/c")]
    await guest_volumes("cid", mounts, chown=True)
    assert [path.stat().st_uid for path in (ours, ours / "file")] == [0, 0]
    assert [path.stat().st_uid for path in (readonly / "file", host / "file", outside)] == [1000] * 3


async def test_a_source_is_the_volume_of_its_name(tmp_path: Path) -> None:
    volume = atomic(tmp_path / "kubernetes.io~secret" / "keys", authorized_keys=b"ssh-ed25519 AAAA\n", other=b"\xff")
    source = DataSource(kind=SourceKind.SECRET, name="keys")
    mounts = [mount(volume, "/keys")]
    assert await source_content(source, mounts, "ssh-key-source") == {
        "authorized_keys": b"ssh-ed25519 AAAA\n",
        "other": b"\xff",
    }
    assert await source_content(None, mounts, "ssh-key-source") is None
    for wrong in (
        DataSource(kind=SourceKind.CONFIGMAP, name="keys"),
        DataSource(kind=SourceKind.SECRET, name="key"),
    ):
        with pytest.raises(NotFound, match="is not among the container's volumes.*named"):
            await source_content(wrong, mounts, "ssh-key-source")


async def test_a_source_that_is_too_large_is_refused(tmp_path: Path) -> None:
    volume = atomic(tmp_path / "kubernetes.io~configmap" / "big", one=b"x" * FILE_LIMIT, two=b"x")
    with pytest.raises(InvalidArgument, match="more than 1048576 bytes"):
        await source_content(DataSource(kind=SourceKind.CONFIGMAP, name="big"), [mount(volume, "/b")], "a")


async def test_links_out_of_a_source_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    volume = atomic(tmp_path / "kubernetes.io~configmap" / "m", key=b"value")
    (volume / "..2026" / "stolen").symlink_to(tmp_path / "secret")
    found = await source_content(DataSource(kind=SourceKind.CONFIGMAP, name="m"), [mount(volume, "/m")], "a")
    assert found == {"key": b"value"}
