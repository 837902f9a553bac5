"""What mounts are on the host, and how they reach the OCI configuration."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import vmruntime.volumes.survey
from vmruntime.errors import FailedPrecondition, InvalidArgument, Unimplemented
from vmruntime.model.container import Mount
from vmruntime.model.sandbox import IdMapping, UserNamespace
from vmruntime.pods.oci.mounts import BindMount, container_mounts
from vmruntime.volumes.mounting import MountEntry, mounts
from vmruntime.volumes.survey import MemoryVolume, SharedVolume, survey
from vmruntime.volumes.virtiofsd import find_virtiofsd, virtiofsd_argv


def entry(
    point: Path | str, fs_type: str = "ext4", device: str = "8:1", root: str = "/", receives: bool = False
) -> MountEntry:
    return MountEntry(mount_point=str(point), fs_type=fs_type, device=device, root=root, receives=receives)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[MountEntry]:
    entries = [entry("/")]
    monkeypatch.setattr(vmruntime.volumes.survey, "mounts", lambda: entries)
    return entries


def test_links_are_followed_and_missing_directories_made(table: list[MountEntry], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    one, two = survey(
        [
            Mount(container_path="/a", host_path=str(tmp_path / "link")),
            Mount(container_path="/b", host_path=str(tmp_path / "x" / "y")),
        ]
    )
    assert isinstance(one, SharedVolume)
    assert isinstance(two, SharedVolume)
    assert (one.source, one.directory) == (str(tmp_path / "file"), False)
    assert two.directory
    assert (tmp_path / "x" / "y").is_dir()


@pytest.mark.parametrize(
    ("mount", "below", "expected"),
    [
        (Mount(container_path="/a", readonly=True), False, True),
        (Mount(container_path="/a", readonly=True), True, False),
        (Mount(container_path="/a", readonly=True, recursive_readonly=True), True, True),
        (Mount(container_path="/a", readonly=True, propagation="rslave"), False, False),
        (Mount(container_path="/a"), False, False),
    ],
)
def test_the_guest_mounts_readonly_only_where_all_is(
    table: list[MountEntry], tmp_path: Path, mount: Mount, below: bool, expected: bool
) -> None:
    table.append(entry(tmp_path, receives=True))
    if below:
        table.append(entry(tmp_path / "sub"))
    (found,) = survey([msgspec.structs.replace(mount, host_path=str(tmp_path))])
    assert isinstance(found, SharedVolume)
    assert found.guest_readonly is expected


def test_an_empty_dir_in_memory_and_a_part_of_it(table: list[MountEntry], tmp_path: Path) -> None:
    volume, part = tmp_path / "kubernetes.io~empty-dir" / "cache", tmp_path / "volume-subpaths" / "cache" / "0"
    for directory in (volume, part):
        directory.mkdir(parents=True)
    table += [entry(volume, "tmpfs", "0:50"), entry(part, "tmpfs", "0:50", root="/sub/dir")]
    whole, piece, secret = survey(
        [
            Mount(container_path="/a", host_path=str(volume)),
            Mount(container_path="/b", host_path=str(part), readonly=True),
            Mount(container_path="/c", host_path=str(tmp_path)),
        ]
    )
    assert isinstance(whole, MemoryVolume)
    assert isinstance(piece, MemoryVolume)
    assert (whole.key, whole.sub_path, piece.key, piece.sub_path) == (piece.key, "", whole.key, "sub/dir")
    assert isinstance(secret, SharedVolume)


def test_a_memory_volume_belongs_to_the_ids_its_mount_is_mapped_to(table: list[MountEntry], tmp_path: Path) -> None:
    volume = tmp_path / "kubernetes.io~empty-dir" / "cache"
    volume.mkdir(parents=True)
    table.append(entry(volume, "tmpfs", "0:50"))
    owner = volume.stat()
    mapped = IdMapping(container_id=0, host_id=100_000, length=max(owner.st_uid, owner.st_gid) + 1)
    none = IdMapping(container_id=0, host_id=100_000, length=max(1, owner.st_gid))
    for gids, expected in ((mapped, 100_000 + owner.st_gid), (none, 65534 if owner.st_gid else 100_000)):
        ids = UserNamespace(uids=mapped, gids=gids)
        (found,) = survey([Mount(container_path="/a", host_path=str(volume), ids=ids)])
        assert isinstance(found, MemoryVolume)
        assert (found.uid, found.gid) == (100_000 + owner.st_uid, expected)


def test_refusals_name_field_and_remedy(table: list[MountEntry], tmp_path: Path) -> None:
    with pytest.raises(Unimplemented, match=r"config.mounts\[0\].propagation.*vmruntime.io/kind: host"):
        survey([Mount(container_path="/a", host_path="/", propagation="rshared")])
    with pytest.raises(FailedPrecondition, match="mount --make-rshared /"):
        survey([Mount(container_path="/a", host_path=str(tmp_path), propagation="rslave")])
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match=r"config.mounts\[0\].host_path"):
        survey([Mount(container_path="/a", host_path=str(tmp_path / "file" / "x"))])


def test_image_volumes_are_somebody_elses() -> None:
    assert survey([Mount(container_path="/a", image="x")]) == []


def test_mountinfo_is_read() -> None:
    found = mounts()
    assert found[0].device.count(":") == 1
    assert any(one.mount_point == "/proc" and one.fs_type == "proc" for one in found)


def test_volumes_come_after_parents_and_replace_the_kernels() -> None:
    volumes = [
        BindMount(destination="/data/deep", source="share:c/0", readonly=False),
        BindMount(destination="/data", source="share:c/1", readonly=True),
        BindMount(destination="/dev/mqueue/", source="share:c/2", readonly=False, propagation="rslave"),
    ]
    found = container_mounts(volumes, privileged=False)
    assert [mount["destination"] for mount in found[-3:]] == ["/data", "/data/deep", "/dev/mqueue/"]
    assert [mount["type"] for mount in found].count("mqueue") == 0
    assert found[-3]["options"] == ["rbind", "rprivate", "ro"]
    assert found[-1]["options"] == ["rbind", "rslave", "rw"]
    flagged = BindMount(destination="/f", source="share:c/3", readonly=False, options=["noexec", "nodev"])
    for user_namespace, flags in ((False, ["noexec", "nodev"]), (True, ["rnoexec", "rnodev"])):
        found = container_mounts([flagged], privileged=False, user_namespace=user_namespace)
        assert found[-1]["options"] == ["rbind", "rprivate", "rw", *flags]


def test_both_virtiofsd(tmp_path: Path) -> None:
    program = tmp_path / "virtiofsd"
    program.touch(0o755)
    assert find_virtiofsd(str(program)) == str(program)
    with pytest.raises(FailedPrecondition, match="volumes.virtiofsd"):
        find_virtiofsd(str(tmp_path / "none"))
    assert "--shared-dir=/s" in virtiofsd_argv("v", rust=True, root=Path("/s"), fd=3)
    assert "source=/s" in virtiofsd_argv("v", rust=False, root=Path("/s"), fd=3)
