"""Writes the guest's initial file system as a reproducible "newc" cpio archive, without needing root or mknod.

Usage: python3 pack.py OUTPUT --agent FILE [--file PATH=FILE]... [--modules TREE LIST]

Needs only the standard library of Python 3.9 or later: it runs before the virtual environment exists.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DIRECTORIES = ("dev", "proc", "sys", "run", "tmp", "etc", "usr", "usr/bin")
MODULE_DIRECTORY = "usr/lib/modules"
MODULE_LIST = "etc/vmruntime/modules"
SUFFIXES = (".ko", ".ko.xz", ".ko.zst")


@dataclass(frozen=True)
class Entry:
    """One file of the archive; its path has no leading slash."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass
class Archive:
    """Entries in the order they are written; parent directories are added by themselves."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory and those above it."""
        parent = os.path.dirname(path)
        if parent and parent not in self.entries:
            self.directory(parent)
        self.entries[path] = Entry(path, stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._parent_of(path)
        self.entries[path] = Entry(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._parent_of(path)
        self.entries[path] = Entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._parent_of(path)
        self.entries[path] = Entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def _parent_of(self, path: str) -> None:
        parent = os.path.dirname(path)
        if parent and parent not in self.entries:
            self.directory(parent)

    def encode(self) -> Iterator[bytes]:
        """Yield the archive: owners are root, times are zero, inode numbers count from one."""
        for inode, entry in enumerate(self.entries.values(), start=1):
            yield _record(inode, entry)
        yield _record(0, Entry("TRAILER!!!", 0))


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers) + name
    return _padded(header) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


class Modules:
    """The modules of one kernel, as its package lays them out (depmod need not have run)."""

    def __init__(self, tree: Path) -> None:
        self._paths: dict[str, Path] = {}
        for path in sorted(tree.rglob("*.ko*")):
            stem = next((path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.endswith(suffix)), None)
            if stem is not None:
                self._paths[_normal(stem)] = path
        built_in = tree / "modules.builtin"
        lines = built_in.read_text().splitlines() if built_in.exists() else []
        self._built_in = {_normal(Path(line).name.removesuffix(".ko")) for line in lines}

    def in_load_order(self, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield each module after those it depends on, once, as a name and an uncompressed object.

        Raises:
            SystemExit: a required module is neither in the tree nor built in.
        """
        done: set[str] = set()
        missing = []
        for request in wanted:
            name = _normal(request.removeprefix("?"))
            if name in self._built_in or name in done:
                continue
            if name not in self._paths:
                if not request.startswith("?"):
                    missing.append(name)
                continue
            yield from self._with_dependencies(name, done)
        if missing:
            raise SystemExit(f"missing-modules: {' '.join(missing)}")

    def _with_dependencies(self, name: str, done: set[str]) -> Iterator[tuple[str, bytes]]:
        if name in done or name in self._built_in:
            return
        done.add(name)
        if name not in self._paths:
            raise SystemExit(f"missing-modules: {name}")
        data = _uncompressed(self._paths[name])
        for dependency in _dependencies(data):
            yield from self._with_dependencies(dependency, done)
        yield name, data


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _uncompressed(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", str(path)], check=True, capture_output=True).stdout
    return path.read_bytes()


def _dependencies(module: bytes) -> list[str]:
    # .modinfo is a run of NUL-terminated key=value strings; "depends" is there once, perhaps empty.
    found = re.search(rb"\0depends=([\w,-]*)\0", module)
    return [_normal(name.decode()) for name in found[1].split(b",") if name] if found else []


def _requests(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def main() -> None:
    """Write the archive the arguments describe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="the archive to write, or - for standard output")
    parser.add_argument("--agent", type=Path, required=True, help="the static binary that becomes /init")
    parser.add_argument("--file", action="append", default=[], metavar="PATH=FILE", help="one more executable")
    parser.add_argument("--modules", nargs=2, type=Path, metavar=("TREE", "LIST"), help="modules to carry")
    options = parser.parse_args()

    archive = Archive()
    for path in DIRECTORIES:
        archive.directory(path)
    archive.directory("tmp", 0o1777)
    # The kernel opens the console before devtmpfs is mounted; without this node init has no standard output.
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3, 0o666)
    archive.file("init", options.agent.read_bytes(), 0o755)
    for item in options.file:
        path, _, source = item.partition("=")
        archive.file(path.lstrip("/"), Path(source).read_bytes(), 0o755)
    if options.modules:
        tree, requests = options.modules
        listed = []
        for name, data in Modules(tree).in_load_order(_requests(requests)):
            path = f"{MODULE_DIRECTORY}/{name}.ko"
            archive.file(path, data)
            listed.append(f"/{path}\n")
        archive.file(MODULE_LIST, "".join(listed).encode())

    if str(options.output) == "-":
        sys.stdout.buffer.writelines(archive.encode())
    else:
        with options.output.open("wb") as output:
            output.writelines(archive.encode())


if __name__ == "__main__":
    main()
