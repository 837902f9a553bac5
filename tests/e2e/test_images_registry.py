"""Images from a real registry, docker-registry, by skopeo, on this machine; test_images_unpacking.py is about layers."""

from __future__ import annotations

import asyncio
import base64
import gzip
import itertools
import json
import os
import re
import stat
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import registry as reg
from tests.support.image_host import NAME, Host
from tests.support.registry import Registry, build_image, files, layer, member
from vmruntime.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    VmruntimeError,
)
from vmruntime.images.platform import Platform
from vmruntime.images.progress import Phase, PullProgress
from vmruntime.images.service import ImageService
from vmruntime.model.image import Image, RegistryAuth

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with reg.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Registry]:
    with reg.registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def host(tmp_path: Path, server: Registry) -> Host:
    return Host(tmp_path / "host", server.address)


@contextmanager
def mounted(service: ImageService, image: Image, tmp_path: Path, number: int = -1) -> Iterator[Path]:
    """Mount one layer of an image with the kernel's EROFS."""
    path = service.layer_path(image.layers[number])
    assert subprocess.run(["fsck.erofs", str(path)], stdout=subprocess.DEVNULL).returncode == 0
    target = tmp_path / "mnt"
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,ro", "-t", "erofs", str(path), str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


async def test_pull_makes_layers_a_vm_can_mount(host: Host, server: Registry, tmp_path: Path) -> None:
    capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    members = [
        member("etc", type=tarfile.DIRTYPE, mode=0o750, uid=7, gid=8),
        member("etc/file", b"hello", uid=12345, gid=54321, mode=0o4755),
        member("link", type=tarfile.SYMTYPE, linkname="/etc/file"),
        member("hard", type=tarfile.LNKTYPE, linkname="etc/file"),
        member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("ping", b"x", pax_headers={"SCHILY.xattr.security.capability": capability}),
        member("tagged", b"x", pax_headers={"SCHILY.xattr.user.note": "n"}),
        member("steered", b"x", pax_headers={"SCHILY.xattr.trusted.overlay.redirect": "/etc"}),
        member("etc/.wh.passwd"),
        member("var/.wh..wh..opq"),
        member("var/new", b"n"),
    ]
    config: dict[str, Any] = {
        "Entrypoint": ["/e"],
        "Cmd": None,
        "Env": ["A=b"],
        "User": "7:8",
        "WorkingDir": "/w",
        "Labels": {"k": "v"},
        "Volumes": {"/data": {}},
        "StopSignal": "SIGQUIT",
    }
    server.push(build_image(tmp_path / "l", [files({"base": b"b"}), layer(members)], config=config), "app:1")
    seen: list[PullProgress] = []
    async with host.service(group_id=12) as service:
        image = await service.pull(NAME, progress=seen.append)
        assert image.repo_tags == [NAME]
        assert re.fullmatch(r"registry\.example/app@sha256:[0-9a-f]{64}", image.repo_digests[0])
        assert image.config.entrypoint == ["/e"]
        assert image.config.volumes == ["/data"]
        assert image.config.user == "7:8"
        assert service.fs_usage().used_bytes == image.size > 0
        with mounted(service, image, tmp_path) as root:
            status = (root / "etc/file").stat()
            assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 54321, 0o4755)
            assert status.st_mtime == 1_000_000_000
            assert status.st_nlink == 2
            assert (root / "etc").stat().st_mtime == 1_000_000_000
            assert stat.S_IMODE((root / "etc").stat().st_mode) == 0o750
            assert os.readlink(root / "link") == "/etc/file"
            assert (root / "null").stat().st_rdev == os.makedev(1, 3)
            assert os.getxattr(root / "ping", "security.capability").decode() == capability
            assert os.getxattr(root / "tagged", "user.note") == b"n"
            assert os.listxattr(root / "steered") == []
            whiteout = (root / "etc/passwd").stat()
            assert stat.S_ISCHR(whiteout.st_mode)
            assert whiteout.st_rdev == 0
            assert os.getxattr(root / "var", "trusted.overlay.opaque") == b"y"
            assert sorted(os.listdir(root / "var")) == ["new"]
            assert sorted(os.listdir(root / "etc")) == ["file", "passwd"]
            assert stat.S_IMODE(root.stat().st_mode) == 0o755
        file = service.layer_path(image.layers[0]).stat()
        assert (stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid) == (0o440, 0, 12)
        assert stat.S_IMODE(host.paths.layers.stat().st_mode) == 0o750
    assert host.leftovers() == []
    assert seen[0].phase is Phase.RESOLVING
    assert seen[-1].phase is Phase.DONE
    assert seen[-2].layers_done == seen[-2].layers_total == 2
    assert seen[-2].done == seen[-2].total > 0


async def test_base_is_not_downloaded_twice(host: Host, server: Registry, tmp_path: Path) -> None:
    base, top = files({"base": os.urandom(200_000)}), files({"top": b"t"})
    server.push(build_image(tmp_path / "a", [base]), "base:1")
    server.push(build_image(tmp_path / "b", [base, top]), "app:1")
    async with host.service() as service:
        await service.pull("registry.example/base:1")
        before = len(server.blob_downloads())
        image = await service.pull(NAME)
        fetched = server.blob_downloads()[before:]
        assert base.digest not in fetched
        assert top.digest in fetched
        assert [each.diff_id for each in image.layers] == [base.diff_id, top.diff_id]
        before = len(server.blob_downloads())
        again = await service.pull(NAME)
        assert not {base.digest, top.digest} & set(server.blob_downloads()[before:])
        assert again.id == image.id
        assert len(service.list()) == 2


@pytest.mark.parametrize(
    ("form", "pack"),
    [("oci", reg.gzipped), ("oci", reg.zstd), ("oci", None), ("v2s2", reg.gzipped), ("v2s2", None)],
)
async def test_formats_and_compressions(host: Host, server: Registry, tmp_path: Path, form: str, pack: Any) -> None:
    base = layer([member("a", b"x" * 10_000)], pack)
    config = {"Cmd": ["/x"], "Healthcheck": {"Test": ["NONE"]}, "ArgsEscaped": True}
    server.push(build_image(tmp_path / "l", [base], config=config), "app:1", "--format", form)
    async with host.service() as service:
        image = await service.pull(NAME)
        assert [each.diff_id for each in image.layers] == [base.diff_id]
        assert image.id == await _config_digest(server, "app:1")
        # With the layer here, skopeo meets a stand-in instead of the blob: the result has to be the same.
        assert (await service.pull("registry.example/app:1")).id == image.id


async def _config_digest(server: Registry, name: str) -> str:
    argv = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{server.address}/{name}"]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return str(json.loads(out)["config"]["digest"])


async def test_index_gives_the_platform_and_its_own_digest(host: Host, server: Registry, tmp_path: Path) -> None:
    layout = reg.Layout(tmp_path / "l")
    entries = [
        layout.image(
            [files({"arch": name.encode()})], architecture=name, platform={"os": "linux", "architecture": name}
        )
        for name in ("arm64", "amd64")
    ]
    index = layout.multi_platform(entries)
    server.push(layout.publish(index), "app:1")
    async with host.service() as service:
        image = await service.pull(NAME)
        assert image.repo_digests == [f"registry.example/app@{index['digest']}"]
        by_digest = await service.pull(f"registry.example/app:ignored@{index['digest']}")
        assert by_digest.id == image.id
        assert service.status(image.repo_digests[0]) == by_digest
        by_manifest = await service.pull(f"registry.example/app@{entries[1]['digest']}")
        assert by_manifest.id == image.id
        assert len(by_manifest.repo_digests) == 2
    async with host.service(platform=Platform("s390x")) as service:
        with pytest.raises(NotFound, match=r"no image for linux/s390x.*linux/amd64, linux/arm64"):
            await service.pull(NAME)
    async with host.service(platform=Platform("arm64", ("v8", ""))) as service:
        assert (await service.pull(NAME)).id != image.id


async def test_odd_shapes(host: Host, server: Registry, tmp_path: Path) -> None:
    empty = layer(b"\0" * 1024)
    one, two = files({"x": b"1"}), files({"x": b"2"})
    server.push(build_image(tmp_path / "zero", []), "zero:1")
    server.push(build_image(tmp_path / "twice", [one, empty, two, empty, one]), "twice:1")
    server.push(build_image(tmp_path / "many", [files({f"f{n}": b"x"}) for n in range(127)]), "many:1")
    async with host.service() as service:
        assert (await service.pull("registry.example/zero:1")).layers == []
        twice = await service.pull("registry.example/twice:1")
        assert [each.diff_id for each in twice.layers] == [two.diff_id, empty.diff_id, one.diff_id]
        assert len((await service.pull("registry.example/many:1")).layers) == 127


async def test_concurrent_pulls_share(host: Host, server: Registry, tmp_path: Path) -> None:
    base = files({"base": os.urandom(500_000)})
    server.push(build_image(tmp_path / "a", [base, files({"a": b"a"})]), "a:1")
    server.push(build_image(tmp_path / "b", [base, files({"b": b"b"})]), "b:1")
    async with host.service() as service:
        async with asyncio.TaskGroup() as group:
            names = ["registry.example/a:1"] * 4 + ["registry.example/b:1"] * 2
            pulls = [group.create_task(service.pull(name)) for name in names]
        assert len({pull.result().id for pull in pulls}) == 2
        assert server.requests().count("GET /v2/a/manifests/1 200") == 2  # one inspect, one copy
        assert len(host.layer_files()) == 3


async def test_cancelled_callers(host: Host, server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "a", [files({"a": os.urandom(20_000_000)})]), "app:1")
    async with host.service() as service:
        first, second = (asyncio.ensure_future(service.pull(NAME)) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        assert (await second).repo_tags == [NAME]
        await service.remove(NAME)
        assert host.layer_files() == []
        for delay in (0.0, 0.02, 0.06, 0.1, 0.15, 0.2):
            lonely = asyncio.ensure_future(service.pull(NAME))
            await asyncio.sleep(delay)
            lonely.cancel()
            await asyncio.wait([lonely])
            assert host.leftovers() == []
            if lonely.cancelled():
                assert service.list() == []
            await service.remove(NAME)  # a fast machine may have been done
        await service.sweep()
        assert host.layer_files() == []
        assert (await service.pull(NAME)).repo_tags == [NAME]


async def test_authentication(tmp_path: Path) -> None:
    with reg.registry(tmp_path / "registry", auth=True) as server:
        server.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1")
        host = Host(tmp_path / "host", server.address)
        name = f"{server.address}/app:1"
        async with host.service() as service:
            with pytest.raises(PermissionDenied):
                await service.pull(name, tls_verify=False)
            wrong = RegistryAuth(username=reg.USER, password="wrong-and-secret")
            with pytest.raises(PermissionDenied) as caught:
                await service.pull(name, wrong, tls_verify=False)
            assert "wrong-and-secret" not in str(caught.value)
            elsewhere = RegistryAuth(username=reg.USER, password=reg.PASSWORD, server_address="other.example")
            with pytest.raises(PermissionDenied):  # meant for somebody else
                await service.pull(name, elsewhere, tls_verify=False)
            auth = RegistryAuth(username=reg.USER, password=reg.PASSWORD, server_address=f"http://{server.address}/v1/")
            assert (await service.pull(name, auth, tls_verify=False)).repo_tags == [name]
            encoded = base64.b64encode(f"{reg.USER}:{reg.PASSWORD}".encode()).decode()
            await service.pull(name, RegistryAuth(auth=encoded), tls_verify=False)
        assert host.leftovers() == []


async def test_failures_say_what_and_leave_nothing(host: Host, server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1")
    server.push(build_image(tmp_path / "w", [files({"a": b"a"})], os="windows"), "win:1", "--override-os", "windows")
    wrong = [reg.sha256(b"something else")]
    server.push(build_image(tmp_path / "d", [files({"unlike": b"a"})], diff_ids=wrong), "liar:1")
    server.push(build_image(tmp_path / "c", [files({"a": b"a"})], diff_ids=wrong * 2), "count:1")
    broken = layer([member("broken", os.urandom(50_000))])
    server.push(build_image(tmp_path / "b", [broken]), "broken:1")
    data = bytearray(server.blob_file(broken.digest).read_bytes())
    data[25_000] ^= 0xFF
    server.blob_file(broken.digest).write_bytes(data)
    cases: list[tuple[str, type[VmruntimeError], str]] = [
        ("registry.example/app:2", NotFound, "manifest unknown"),
        ("registry.example/nothing:1", NotFound, "unknown"),
        ("dead.example/app:1", Unavailable, "^RegistryUnavailable: .*connection refused"),
        (f"{server.address}/app:1", Unavailable, "^RegistryUnavailable: .*HTTPS"),
        ("registry.example/win:1", FailedPrecondition, "platform windows/amd64"),
        ("registry.example/liar:1", FailedPrecondition, f"corrupt.*{wrong[0]}"),
        ("registry.example/count:1", FailedPrecondition, "1 layers but .* 2 diff_ids"),
        ("registry.example/broken:1", FailedPrecondition, "corrupt"),
        ("registry.example/Capital:1", InvalidArgument, "Capital"),
    ]
    async with host.service() as service:
        for name, kind, text in cases:
            with pytest.raises(kind, match=text):
                await service.pull(name)
            assert host.leftovers() == []
        assert service.list() == []
        assert (await service.pull(f"{server.address}/app:1", tls_verify=False)).repo_tags


async def test_signature_policy(server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "app:1")
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "reject"}]}')
    host = Host(tmp_path / "host", server.address, policy=str(policy))
    async with host.service() as service:
        with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed"):
            await service.pull(NAME)
    allowing = Host(tmp_path / "host", server.address)
    async with allowing.service() as service:
        await service.pull(NAME)
    async with host.service() as service:  # also when every layer is here
        with pytest.raises(PermissionDenied, match=r"^SignatureValidationFailed"):
            await service.pull(NAME)


def _hostile() -> dict[str, list[tuple[tarfile.TarInfo, bytes]]]:
    symlink, hardlink = tarfile.SYMTYPE, tarfile.LNKTYPE
    return {
        "dotdot": [member("../escape", b"x")],
        "inner-dotdot": [member("a/../../escape", b"x")],
        "through-absolute-link": [member("l", type=symlink, linkname="@"), member("l/escape", b"x")],
        "through-relative-link": [member("l", type=symlink, linkname="../../../.."), member("l@/escape", b"x")],
        "hard-link-out": [member("h", type=hardlink, linkname="@/secret"), member("h", b"changed")],
        "hard-link-to-link": [
            member("l", type=symlink, linkname="@/secret"),
            member("h", type=hardlink, linkname="l"),
            member("h", b"changed"),
        ],
        "file-over-link": [member("l", type=symlink, linkname="@/secret"), member("l", b"changed")],
        "chained-links": [
            member("d", type=tarfile.DIRTYPE),
            member("d/up", type=symlink, linkname=".."),
            member("d/upup", type=symlink, linkname="up/.."),
            member("d/upup/escape", b"x"),
        ],
        "whiteout-of-parent": [member("d/.wh...", b"")],
        "whiteout-directory": [member("d/.wh.x", type=tarfile.DIRTYPE), member("d/.wh.x/in", b"x")],
        "absolute": [member("/@/escape", b"x")],
    }


# What would lead outside elsewhere stays inside here; the rest is refused.
HARMLESS = {"absolute", "file-over-link", "hard-link-to-link", "whiteout-directory"}


@pytest.mark.parametrize("case", sorted(_hostile()))
async def test_hostile_layers_do_not_escape(host: Host, server: Registry, tmp_path: Path, case: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    members = _hostile()[case]
    for info, _ in members:
        info.name = info.name.replace("@", str(outside))
        info.linkname = info.linkname.replace("@", str(outside))
    server.push(build_image(tmp_path / "l", [layer(members)]), "app:1")
    async with host.service() as service:
        if case in HARMLESS:
            await service.pull(NAME)
        else:
            with pytest.raises(FailedPrecondition, match="layer"):
                await service.pull(NAME)
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    assert not list(host.paths.root.rglob("escape"))
    assert host.leftovers() == []


def _sparse_tar(directory: Path, sizes: list[int]) -> bytes:
    directory.mkdir()
    for number, size in enumerate(sizes):
        with open(directory / f"hole{number}", "wb") as file:
            file.truncate(size)
    return subprocess.run(["tar", "-cS", "-C", str(directory), "."], stdout=subprocess.PIPE, check=True).stdout


async def test_size_limits(host: Host, server: Registry, tmp_path: Path) -> None:
    bomb = layer([member("zeros", b"\0" * 20_000_000)])
    server.push(build_image(tmp_path / "l", [bomb]), "bomb:1")
    for name, sizes in (("sparse", [50_000_000]), ("several", [6_000_000, 6_000_000])):
        tar = await asyncio.to_thread(_sparse_tar, tmp_path / name, sizes)
        assert len(tar) < 100_000
        server.push(build_image(tmp_path / f"{name}-layout", [layer(tar)]), f"{name}:1")
    async with host.service(max_layer_bytes=10_000_000) as service:
        for name in ("bomb", "sparse", "several"):
            with pytest.raises(ResourceExhausted, match="max_layer_gib"):
                await service.pull(f"registry.example/{name}:1")
        assert host.leftovers() == []
        assert host.layer_files() == []
    async with host.service() as service:
        assert (await service.pull("registry.example/sparse:1")).layers


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB at the host's persistent root."""
    root = tmp_path / "host/lib"
    root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(root)], check=True)
    yield root
    subprocess.run(["umount", str(root)], check=True)


@pytest.mark.usefixtures("small_disk")
async def test_full_disk(server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [layer([member("zeros", b"\0" * 20_000_000)])]), "app:1")
    host = Host(tmp_path / "host", server.address)
    async with host.service() as service:
        with pytest.raises(ResourceExhausted, match=f"{host.paths.incoming}.* bytes"):
            await service.pull(NAME)
        assert host.leftovers() == []


async def test_names_move_and_images_go(host: Host, server: Registry, tmp_path: Path) -> None:
    base = files({"base": b"b"})
    server.push(build_image(tmp_path / "a", [base, files({"v": b"1"})]), "app:1")
    async with host.service() as service:
        old = await service.pull(NAME)
        server.push(build_image(tmp_path / "b", [base, files({"v": b"2"})]), "app:1")
        new = await service.pull(NAME)
        assert new.id != old.id
        assert service.status(NAME) == new
        kept = service.status(old.id)
        assert kept is not None
        assert kept.repo_tags == []
        assert kept.repo_digests == old.repo_digests
        await service.touch([new.id])
    async with host.service() as service:  # after a restart
        found = service.status(new.id[:20])
        assert found is not None
        assert found.last_used_at > 0
        assert len(host.layer_files()) == 3
        await service.remove(old.id)
        assert len(host.layer_files()) == 2
        await service.remove(old.id)
        await service.remove(NAME)
        assert service.status(new.id) is None
        assert host.layer_files() == []


async def test_layers_in_use_stay_until_swept(host: Host, server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "a", [files({"a": b"1"}), files({"b": b"1"})]), "app:1")
    running: set[str] = set()
    async with host.service(in_use=lambda: running) as service:
        image = await service.pull(NAME)
        running.add(image.layers[0].diff_id)
        service.hold(image.layers[1:], "being created")
        await service.remove(NAME)
        assert len(host.layer_files()) == 2
        service.release("being created")
        await service.sweep()
        assert len(host.layer_files()) == 1
        running.clear()
        await service.sweep()
        assert host.layer_files() == []


async def test_pruning_beside_pulls(host: Host, server: Registry, tmp_path: Path) -> None:
    base = files({"base": os.urandom(300_000)})
    names = [f"registry.example/{letter}:1" for letter in "ab"]
    for letter in "ab":
        server.push(build_image(tmp_path / letter, [base, files({letter: b"x"})]), f"{letter}:1")
    async with host.service() as service:

        async def pull(name: str) -> None:
            for _ in range(4):
                image = await service.pull(name)
                assert image.layers[0].diff_id == base.diff_id

        async with asyncio.TaskGroup() as group:
            pulls = [group.create_task(pull(name)) for name in names]
            removed = 0
            while not all(done.done() for done in pulls):
                removed += len((await service.prune(0)).images)
                await asyncio.sleep(0.01)
        assert removed >= 6
        images = [await service.pull(name) for name in names]
        assert len(host.layer_files()) == 3
        for image in images:
            with mounted(service, image, tmp_path) as root:
                assert len(list(root.iterdir())) == 1
        assert len((await service.prune(0)).images) == 2
        assert host.layer_files() == []
        assert host.leftovers() == []


async def test_recovery(host: Host, server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "a", [files({"a": b"1"})]), "app:1")
    async with host.service() as service:
        image = await service.pull(NAME)
        path = service.layer_path(image.layers[0])
        content = path.read_bytes()
    (host.paths.incoming / "crashed").mkdir()
    (host.paths.run / "pulls/crashed").mkdir()
    (host.paths.layers / "unknown.erofs").write_bytes(b"x")
    async with host.service() as service:
        await service.sweep()
        assert host.leftovers() == []
        assert host.layer_files() == [path]
        assert service.list() == [image]
    path.unlink()
    async with host.service() as service:
        assert service.list() == []
        await service.pull(NAME)
        assert path.read_bytes() == content  # the same layer gives the same bytes


async def test_stalled_registry(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    host = Host(tmp_path / "host", address, pull_timeout=0.5)
    async with listener, host.service() as service:
        with pytest.raises(Unavailable, match=r"^RegistryUnavailable.*0\.5 s"):
            await service.pull(NAME)
        assert host.leftovers() == []


@asynccontextmanager
async def scripted(manifest: Callable[[], bytes], kind: str, blobs: Path | None = None) -> AsyncIterator[str]:
    """Run a registry whose manifest changes as told and whose layers stop in the middle; yield its address."""
    stop = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(1) == b"\x16":  # an attempt at TLS comes first (RFC 8446: handshake)
            writer.close()
            return
        request = await reader.readuntil(b"\r\n\r\n")
        path = request.split()[1].decode()
        body = b""
        if path.endswith("/manifests/1"):
            body = manifest()
        elif ":" in path and blobs is not None:
            body = await asyncio.to_thread((blobs / path.rpartition(":")[2]).read_bytes)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        whole = len(body) < 5000
        writer.write(head.encode() + (body if whole else body[:5000]))
        await writer.drain()
        if not whole:
            await stop.wait()
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        stop.set()


async def test_schema_1_is_refused(tmp_path: Path) -> None:
    manifest = json.dumps({"schemaVersion": 1, "name": "app", "tag": "1", "fsLayers": [], "history": []}).encode()
    async with scripted(lambda: manifest, "application/vnd.docker.distribution.manifest.v1+json") as address:
        host = Host(tmp_path / "host", address)
        async with host.service() as service:
            with pytest.raises(FailedPrecondition, match="schema 1"):
                await service.pull(NAME)


async def test_transfer_that_stops(tmp_path: Path) -> None:
    layout = reg.Layout(tmp_path / "l")
    image = layout.image([files({"a": os.urandom(50_000)})])
    blobs = tmp_path / "l/blobs/sha256"
    manifest = (blobs / image["digest"].removeprefix("sha256:")).read_bytes()
    async with scripted(lambda: manifest, reg.OCI_MANIFEST, blobs) as address:
        host = Host(tmp_path / "host", address, pull_timeout=1.0)
        async with host.service() as service:
            with pytest.raises(
                Unavailable, match=r"^RegistryUnavailable: nothing has arrived for 1 s; \d+ of \d+ bytes"
            ):
                await service.pull(NAME)
            assert host.leftovers() == []


async def test_tag_that_keeps_moving(tmp_path: Path) -> None:
    layout = reg.Layout(tmp_path / "l")
    blobs = tmp_path / "l/blobs/sha256"
    digests = [layout.image([files({"v": bytes([n])})])["digest"].removeprefix("sha256:") for n in (0, 1)]
    versions = itertools.cycle([(blobs / digest).read_bytes() for digest in digests])
    async with scripted(lambda: next(versions), reg.OCI_MANIFEST, blobs) as address:
        host = Host(tmp_path / "host", address)
        async with host.service() as service:
            with pytest.raises(Aborted, match="changed while it was pulled"):
                await service.pull(NAME)
            assert service.list() == []
            assert host.leftovers() == []


def _save(layout: Path, *targets: str) -> None:
    for target in targets:
        argv = ["skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{layout}:image", target]
        subprocess.run(argv, check=True)


async def test_archives(host: Host, tmp_path: Path) -> None:
    base = files({"a": b"1"})
    layout = build_image(tmp_path / "oci", [base], config={"Cmd": ["/x"]})
    oci, docker = tmp_path / "oci.tar", tmp_path / "docker.tar"
    _save(layout, f"oci-archive:{oci}:image", f"docker-archive:{docker}:registry.example/saved:2")
    async with host.service() as service:
        (one,) = await service.import_archive(f"oci:{layout}:image", ["registry.example/one", "two:3"])
        assert one.repo_tags == ["registry.example/one:latest", "docker.io/library/two:3"]
        assert one.config.cmd == ["/x"]
        assert [each.diff_id for each in one.layers] == [base.diff_id]
        (two,) = await service.import_archive(f"oci-archive:{oci}", ["x"])
        assert two.id == one.id
        (three,) = await service.import_archive(f"docker-archive:{docker}:registry.example/saved:2")
        assert "registry.example/saved:2" in three.repo_tags
        assert three.layers == one.layers
        with pytest.raises(NotFound):
            await service.import_archive(f"oci-archive:{tmp_path}/absent.tar", ["x"])
        with pytest.raises(InvalidArgument, match="absolute"):
            await service.import_archive("oci:relative", ["x"])
    assert host.leftovers() == []


async def test_gzip_in_several_members(host: Host, server: Registry, tmp_path: Path) -> None:
    tar = reg.make_tar([member("a", os.urandom(100_000)), member("b", b"\0" * 3_000_000)])
    blob = b"".join(gzip.compress(tar[at : at + 70_000], mtime=0) for at in range(0, len(tar), 70_000))
    built = reg.BuiltLayer(tar, blob, reg.OCI_LAYER + "+gzip")
    server.push(build_image(tmp_path / "l", [built]), "app:1")
    async with host.service() as service:
        image = await service.pull("registry.example/app:1")
        assert image.layers[0].diff_id == built.diff_id


async def test_short_names_go_to_docker_io(host: Host, server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [files({"a": b"a"})]), "library/busybox:latest")
    async with host.service() as service:
        image = await service.pull("busybox")
        assert image.repo_tags == ["docker.io/library/busybox:latest"]
        for name in ("busybox", "busybox:latest", "docker.io/busybox", image.id, image.id.removeprefix("sha256:")[:12]):
            assert service.status(name) == image
        assert service.status("busybox:other") is None
