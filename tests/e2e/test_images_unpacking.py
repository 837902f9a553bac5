"""Layers as the kernel shows them, beside what GNU tar unpacks; and the program that makes them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.registry import BuiltLayer, gzipped, layer, make_tar, member, zstd
from vmruntime.errors import FailedPrecondition, Internal, ResourceExhausted
from vmruntime.images import erofs
from vmruntime.images.manifest import BadImage

pytestmark = pytest.mark.root

LIMIT = 1 << 30
Entry = tuple[object, ...]


async def build(tmp_path: Path, built: BuiltLayer, limit: int = LIMIT) -> Path:
    blob, work = tmp_path / "blob", tmp_path / "work"
    blob.write_bytes(built.blob)
    work.mkdir(mode=0o700)
    return await erofs.build(blob, built.diff_id, work, limit)


@contextlib.contextmanager
def mounted(image: Path, target: Path) -> Iterator[Path]:
    target.mkdir()
    assert subprocess.run(["fsck.erofs", str(image)], capture_output=True).returncode == 0
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", str(image), str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def listing(root: Path) -> dict[str, Entry]:
    """Return all that a tree is: kinds, owners, times, attributes, contents, and which names are of one file."""
    first: dict[int, str] = {}
    found: dict[str, Entry] = {}
    for directory, folders, files in os.walk(root):
        folders.sort()
        for name in [".", *sorted([*folders, *files])] if directory == str(root) else sorted([*folders, *files]):
            path = Path(directory, name)
            status = path.lstat()
            content: object = status.st_rdev
            if stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            shown = str(path.relative_to(root))
            found[shown] = (
                *(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns),
                None if stat.S_ISDIR(status.st_mode) else first.setdefault(status.st_ino, shown),
                {
                    each: os.getxattr(path, each, follow_symlinks=False)
                    for each in os.listxattr(path, follow_symlinks=False)
                },
                status.st_size if stat.S_ISREG(status.st_mode) else None,
                content,
            )
    return found


def unpacked_by_tar(data: bytes, target: Path) -> Path:
    target.mkdir()
    argv = ["tar", "-x", "-C", str(target), "--numeric-owner", "--same-owner", "--same-permissions"]
    argv += ["--delay-directory-restore", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability"]
    subprocess.run(argv, input=data, check=True, capture_output=True)
    return target


def nasty(directory: Path) -> bytes:
    """Return a tar with every kind of file in GNU's form, then in pax's, made by GNU tar of a tree."""
    tree = directory / "nasty"
    tree.mkdir()
    tree.chmod(0o1751)
    os.chown(tree, 3, 4)
    names = ["plain", "with space", "ünïcode", "new\nline", "-dash", "x" * 255, "\udcff\udcfe", "*?[]\\"]
    for number, name in enumerate(names):
        (tree / name).write_bytes(os.urandom(number * 1500))
        os.chown(tree / name, 1000 * number, 2**31 + number)
        os.chmod(tree / name, 0o4000 >> number % 3 | 0o640)
        os.utime(tree / name, ns=(0, number * 10**17 + 123_456_789))
    deep = tree.joinpath(*["d" * 60] * 8)
    deep.mkdir(parents=True)
    (deep / "leaf").write_bytes(b"x" * 4096)
    os.link(deep / "leaf", tree / "other name")
    os.symlink("/absolute", tree / "link")
    os.symlink("t" * 4000, tree / "long link")
    os.link(tree / "link", tree / "the same link", follow_symlinks=False)
    os.mknod(tree / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(tree / "pipe", 0o600)
    (tree / "empty directory").mkdir(mode=0o700)
    (tree / "many").mkdir()
    for number in range(400):
        (tree / f"many/{number:050}").write_bytes(b"%d" % number)
    os.setxattr(tree / "plain", "user.note", b"n\0\n=")
    os.setxattr(tree / "plain", "user.long", b"v" * 3000)
    os.setxattr(tree / "many", "user.of a directory", b"yes")
    capability = b"\x01\x00\x00\x02\x00\x04" + bytes(14)
    os.setxattr(tree / "with space", "security.capability", capability)
    with open(tree / "holes", "wb") as file:
        for offset in (0, 1 << 20, 3 << 20):
            os.pwrite(file.fileno(), os.urandom(5000), offset)
        file.truncate(9_000_001)
    argv = ["tar", "-c", "-S", "-C", str(tree), "--xattrs", "--xattrs-include=*", "--sort=name", "--numeric-owner", "."]
    first = subprocess.run([*argv, "--format=pax"], stdout=subprocess.PIPE, check=True).stdout
    (tree / "later").write_bytes(b"only in the second")
    return first


async def test_everything_as_gnu_tar_unpacks_it(tmp_path: Path) -> None:
    data = await asyncio.to_thread(nasty, tmp_path)
    expected = listing(await asyncio.to_thread(unpacked_by_tar, data, tmp_path / "expected"))
    assert len(expected) > 420
    for number, pack in enumerate((gzipped, zstd, None)):
        (tmp_path / f"{number}").mkdir()
        image = await build(tmp_path / f"{number}", layer(data, pack))
        with mounted(image, tmp_path / f"{number}/mnt") as root:
            found = listing(root)
        assert found.keys() == expected.keys()
        for name, entry in expected.items():
            assert found[name] == entry, name
        links = {name for name, entry in expected.items() if entry[4] not in (None, name)}
        assert len(links) == 2


async def test_gnus_form(tmp_path: Path) -> None:
    await asyncio.to_thread(nasty, tmp_path)
    argv = ["tar", "-c", "-S", "--format=gnu", "-C", str(tmp_path / "nasty"), "."]
    done = await asyncio.to_thread(lambda: subprocess.run(argv, stdout=subprocess.PIPE, check=True))
    expected = listing(await asyncio.to_thread(unpacked_by_tar, done.stdout, tmp_path / "expected"))
    image = await build(tmp_path, layer(done.stdout))
    with mounted(image, tmp_path / "mnt") as root:
        assert listing(root) == expected


async def test_what_no_file_system_here_would_take(tmp_path: Path) -> None:
    """Attributes too large for ext4, and times that it has no bits for."""
    value = "v" * 60_000
    members = [member("a", b"x" * 5000, mtime=2**40, pax_headers={"SCHILY.xattr.user.large": value}), member("b", b"y")]
    image = await build(tmp_path, layer(members))
    with mounted(image, tmp_path / "mnt") as root:
        assert os.getxattr(root / "a", "user.large") == value.encode()
        assert (root / "a").stat().st_mtime == 2**40
        assert [(root / name).read_bytes() for name in "ab"] == [b"x" * 5000, b"y"]


async def test_large_directories_are_searched(tmp_path: Path) -> None:
    names = [f"{number:x}".rjust(1 + number % 200, "-") for number in range(1, 5000)]
    image = await build(tmp_path, layer([member(f"d/{name}", name.encode()) for name in names]))
    with mounted(image, tmp_path / "mnt") as root:
        assert sorted(os.listdir(root / "d")) == sorted(names)
        for name in names:  # by a binary search over names in order
            assert (root / "d" / name).read_bytes() == name.encode()
        assert not (root / "d/none").exists()
        assert (root / "d").stat().st_nlink == 2


async def test_the_program_has_no_privileges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops where it would read the blob, and tells what it can do."""
    text = """
import json, os, sys
sys.path.append(sys.argv.pop(1))
from vmruntime.images.unpacker import main
def look(*_):
    status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
    facts = {name: status[name] for name in ("Uid", "Gid", "Groups", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs")}
    facts["nets"] = [line.split(":")[0].strip() for line in open("/proc/self/net/dev").read().splitlines()[2:]]
    facts["environment"] = sorted(os.environ)
    facts["root's"] = os.access("/etc/shadow", os.R_OK)
    return {"problem": "told", "message": json.dumps(facts)}
main.run = look
main.main()
"""
    monkeypatch.setattr(erofs, "_PROGRAM", text)
    with pytest.raises(Internal) as told:
        await build(tmp_path, layer([member("a")]))
    facts = json.loads(told.value.message.partition("unpacked: ")[2])
    assert facts.pop("Uid").split() == facts.pop("Gid").split() == ["65534"] * 4
    assert facts.pop("Groups").strip() == ""
    assert {int(facts.pop(name), 16) for name in ("CapPrm", "CapEff", "CapAmb")} == {0}
    assert facts.pop("NoNewPrivs") == "1"
    assert set(facts.pop("environment")) - {"GRPC_ENABLE_FORK_SUPPORT"} == {"LC_ALL", "PATH", "TZ"}
    assert facts == {"nets": ["lo"], "root's": False}


async def test_a_program_that_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, says in (("import sys; sys.exit('oh')", "status 1: oh"), ("print('{')", "said b'{")):
        monkeypatch.setattr(erofs, "_PROGRAM", text)
        (tmp_path / says[:6]).mkdir()
        with pytest.raises(Internal, match=says):
            await build(tmp_path / says[:6], layer([member("a")]))


async def test_it_ends_with_its_caller(tmp_path: Path) -> None:
    data = make_tar([member("a", os.urandom(1 << 20))]) * 200
    task = asyncio.ensure_future(build(tmp_path, layer(data, gzipped)))
    image = tmp_path / "work/layer.erofs"
    while not image.exists() and not task.done():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    users = [link for link in Path("/proc").glob("[0-9]*/fd/*") if _leads_to(link, image)]
    assert users == []


def _leads_to(link: Path, target: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(link) == str(target)
    return False


async def test_layers_that_are_refused(tmp_path: Path) -> None:
    good = layer([member("a", b"x")])
    cases = {
        "digest": (BuiltLayer(b"other", good.blob, good.media_type), BadImage, "is corrupt: it unpacks to"),
        "no tar": (layer(b"x" * 1000), BadImage, "checksum"),
        "cut": (BuiltLayer(good.tar, good.blob[:-9], good.media_type), BadImage, "is corrupt"),
        "xz": (BuiltLayer(good.tar, b"\xfd7zXZ\0", good.media_type), BadImage, "compressed with xz"),
        "large": (layer([member("a", b"\0" * 2_000_000)]), ResourceExhausted, "max_layer_gib"),
    }
    for name, (built, kind, text) in cases.items():
        (tmp_path / name).mkdir()
        with pytest.raises(kind, match=text) as told:
            await build(tmp_path / name, built, limit=1_000_000)
        assert built.diff_id in told.value.message
    assert issubclass(BadImage, FailedPrecondition)


async def test_names_of_one_file_that_go(tmp_path: Path) -> None:
    """Of a file's names, one is in what AUFS left there, and one is taken by another file."""
    hard = tarfile.LNKTYPE
    members = [
        member(".wh..wh.plnk/7", b"content"),
        *(member(name, type=hard, linkname=".wh..wh.plnk/7") for name in "abc"),
        member("c", b"other"),
    ]
    image = await build(tmp_path, layer(members))
    with mounted(image, tmp_path / "mnt") as root:
        assert sorted(os.listdir(root)) == ["a", "b", "c"]
        assert (root / "a").stat().st_nlink == (root / "b").stat().st_nlink == 2
        assert (root / "c").stat().st_nlink == 1
        assert (root / "a").read_bytes() == b"content"
