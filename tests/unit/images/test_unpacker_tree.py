from __future__ import annotations

import stat

import pytest

from vmruntime.images.unpacker import tree
from vmruntime.images.unpacker.problems import BadLayer, TooLarge
from vmruntime.images.unpacker.tree import Directory, Node, Tree


def file(size: int = 0) -> Node:
    node = Node(stat.S_IFREG | 0o644)
    node.size = size
    return node


def link(target: bytes) -> Node:
    node = Node(stat.S_IFLNK | 0o777)
    node.target = target
    return node


def directory(mtime: int = 5) -> Directory:
    return Directory(stat.S_IFDIR | 0o700, 1, 2, mtime)


def at(files: Tree, path: str) -> Node:
    node: Node = files.root
    for part in path.split("/"):
        assert isinstance(node, Directory)
        node = node.children[part.encode()]
    return node


def test_marks() -> None:
    marks = tree.read_marks([b"a", b".wh.b", b".wh..wh..opq", b".wh..wh.plnk", b".wh..hidden", b"x.wh.y"])
    assert marks.gone == [b"b", b".hidden"]
    assert marks.opaque
    assert marks.files == [b".wh.b", b".wh..wh..opq", b".wh..wh.plnk", b".wh..hidden"]


@pytest.mark.parametrize("name", [b".wh.", b".wh..", b".wh..."])
def test_marks_of_nothing(name: bytes) -> None:
    with pytest.raises(BadLayer, match="whiteout"):
        tree.read_marks([name])


def test_whiteouts() -> None:
    files = Tree()
    files.put(b"d/.wh..wh.plnk/link", file())
    files.put(b"d/.wh..wh.aufs", file())
    files.put(b"d/back", file())
    files.put(b"d/.wh.back", file())  # the same layer brings the file back
    files.put(b"d/sub", directory())
    files.put(b"d/.wh.sub", file())
    files.put(b"d/.wh.gone", file())
    files.put(b".wh..wh..opq", file())
    tree.settle(files.root)
    where = at(files, "d")
    assert isinstance(where, Directory)
    assert sorted(where.children) == [b"back", b"gone", b"sub"]
    assert (at(files, "d/gone").mode, at(files, "d/gone").device) == (stat.S_IFCHR, (0, 0))
    assert at(files, "d/sub").xattrs == {b"trusted.overlay.opaque": b"y"}
    assert files.root.xattrs == {b"trusted.overlay.opaque": b"y"}
    assert where.xattrs == {}


def test_names_are_made_plain() -> None:
    files = Tree()
    files.put(b"/./a//b/./c", file())
    assert at(files, "a/b/c").mode == stat.S_IFREG | 0o644
    implied = at(files, "a/b")
    assert (implied.mode, implied.mtime) == (stat.S_IFDIR | 0o755, 0)
    files.put(b"a/b/", directory(7))
    assert at(files, "a/b") is implied
    assert (implied.mode, implied.uid, implied.gid, implied.mtime) == (stat.S_IFDIR | 0o700, 1, 2, 7)
    files.put(b"./", directory(9))
    assert files.root.mtime == 9


def test_the_last_of_one_name_counts() -> None:
    files = Tree()
    files.put(b"a", file(1))
    files.put(b"a", file(2))
    assert at(files, "a").size == 2
    files.put(b"a", link(b"b"))
    files.put(b"a", directory())
    files.put(b"a/in", file())
    files.put(b"a", file(3))
    assert at(files, "a").size == 3


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (b"../x", r"'\.\.'"),
        (b"a/../../x", r"'\.\.'"),
        (b"file/x", "no directory"),
        (b"absolute/x", "no directory"),
        (b"up/x", "no directory"),
        (b"loop/x", "no directory"),
        (b"device/x", "no directory"),
        (b"x" * 256, "256 bytes"),
        (b"x/" * 2048, "4096 bytes"),
        (b"a\0b", "3 bytes"),
        (b"", "0 bytes"),
    ],
)
def test_names_that_are_refused(path: bytes, text: str) -> None:
    files = Tree()
    files.put(b"file", file())
    files.put(b"absolute", link(b"/etc"))
    files.put(b"up", link(b"d/../.."))
    files.put(b"loop", link(b"loop"))
    files.put(b"device", Node(stat.S_IFCHR))
    with pytest.raises(BadLayer, match=text):
        files.put(path, file())


def test_the_root_is_a_directory() -> None:
    with pytest.raises(BadLayer, match="root"):
        Tree().put(b"./.", file())


def test_links_downwards_are_followed() -> None:
    files = Tree()
    files.put(b"usr/lib", directory())
    files.put(b"lib", link(b"./usr//lib"))
    files.put(b"again", link(b"lib"))
    files.put(b"again/x", file())
    assert at(files, "usr/lib/x").mode == stat.S_IFREG | 0o644
    files.put(b"lib", directory())  # takes the link's place
    files.put(b"lib/y", file())
    assert isinstance(at(files, "lib"), Directory)


def test_hard_links() -> None:
    files = Tree()
    files.put(b"d/a", file(3))
    files.put(b"l", link(b"/etc/passwd"))
    files.link(b"b", b"/d/a")
    files.link(b"b", b"./b")
    files.link(b"m", b"l")  # another name of the link, not of what it leads to
    assert at(files, "b") is at(files, "d/a")
    assert at(files, "m") is at(files, "l")
    for target in (b"d", b"none", b"d/none", b"/", b"../d/a", b"l/x"):
        with pytest.raises(BadLayer):
            files.link(b"c", target)


def test_too_many() -> None:
    files = Tree(limit=3)
    files.put(b"a/b", file())
    files.put(b"a/b", file())
    with pytest.raises(TooLarge, match="more than 3 files"):
        files.put(b"a/d", file())


def test_deep_trees() -> None:
    files = Tree()
    for number in range(20):
        files.put(b"/".join([b"d%d" % number, *[b"d"] * 1500]), directory())
    tree.settle(files.root)
