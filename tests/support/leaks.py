"""The leak check: what one daemon, and no other on the machine, has on the host at this moment.

Everything a test's daemon makes can be told from everybody else's: its directories, its parent cgroup, its bridge, its CNI
network and its address reservations have names of their own (tests/support/daemon.py), and whatever else there is
carries the id of one of its sandboxes. The ids come from the daemon's log, its store and its directories.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

SETTLE_SECONDS = 10.0
"""What is on its way out has this long: a killed process to be reaped, a closed connection to be noticed."""

KEPT = re.compile(
    r"root/(vmruntime\.db(-wal|-shm)?|templates/[0-9a-f]{64}(/(memory|scratch|state|template\.json))?|layers/[0-9a-f]{64}\.erofs|disks/[0-9a-f]{64}\.(qcow2|raw|vmdk))"
    r"|run/(daemon\.lock|vmruntime\.sock)"
    # What libvirt's driver inside the daemon has of its own; a machine's name has digits.
    r"|run/libvirt/(uri|cache(/.*)?|etc|etc/qemu\.conf|run/qemu/driver\.pid|[a-z/]+)"
)
"""Files that belong to the daemon itself or to its images, relative to the base directory."""

TEMPLATES = ("/memfd:template", "/memfd:scratch")
"""Descriptors of the daemon's templates, which are made and loaded when they are first asked for, and stay."""

_ID = re.compile(r"\b[0-9a-f]{64}\b")
_CNI_CHAIN_PREFIXES = ("", "DN-", "SN-", "HP-")


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Where to look for what belongs to one daemon.

    Attributes:
        base: Directory with everything of the daemon below it.
        root, run: Its two roots (vmruntime.paths).
        log: Its messages.
        cgroup_parent: Parent of its pods' cgroups, with no one else's below.
        network: Name of its CNI network.
        bridge: Name of that network's bridge; empty: it shares one.
        reservations: Directory of host-local's reservations.
        pid: Returns the daemon's pid, or None while it does not run.
    """

    base: Path
    root: Path
    run: Path
    log: Path
    cgroup_parent: str
    network: str
    bridge: str
    reservations: Path
    pid: Callable[[], int | None]

    def ids(self) -> set[str]:
        """Return the id of every sandbox and container the daemon ever had, as far as it left a trace."""
        found = set(_ID.findall(_text(self.log)))
        for table, column in (("sandboxes", "id"), ("containers", "id"), ("resources", "owner")):
            found |= {str(row[0]) for row in _rows(self.root / "vmruntime.db", f"SELECT {column} FROM {table}")}
        for directory in (self.root / "pods", self.root / "cni"):
            found |= set(_ID.findall(" ".join(path.name for path in _entries(directory))))
        return found


def find(footprint: Footprint) -> set[str]:
    """Return what the daemon has on the host besides images, each as "kind: what exactly"."""
    ids = footprint.ids()
    return {
        f"{kind}: {what}"
        for kind, found in (
            ("process", processes(footprint, ids)),
            ("link", links(footprint)),
            ("network namespace", namespaces(ids)),
            ("mount", mounts(footprint, ids)),
            ("unix socket", sockets(footprint)),
            ("loop device", loops(footprint)),
            ("cgroup", cgroups(footprint, ids)),
            ("file", files(footprint)),
            ("packet filter rule", rules(footprint, ids)),
            ("address reservation", reservations(footprint, ids)),
            ("store row", rows(footprint)),
        )
        for what in found
    }


@contextlib.contextmanager
def nothing_left(
    footprint: Footprint, tidy: Callable[[], None] = lambda: None, kept: Collection[str] = ()
) -> Iterator[None]:
    """Fail unless the daemon has, after the body and `tidy`, no more than it had before.

    That includes open descriptors of the daemon, if it is still the same one or a later one.

    Args:
        footprint: Of the daemon.
        tidy: Called after the body.
        kept: Ids of sandboxes and containers that several tests share: what carries their name may come and go.
    """
    before, descriptors = find(footprint), open_descriptors(footprint.pid())
    yield
    tidy()
    left = settle(footprint, before, descriptors, kept)
    assert not left, "left behind:\n  " + "\n  ".join(left)


def settle(
    footprint: Footprint, before: set[str], descriptors: Sequence[str] | None = None, kept: Collection[str] = ()
) -> list[str]:
    """Return what is there and was not before, once it has had time to go away."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        left = sorted(find(footprint) - before)
        if descriptors is not None:
            more = new_descriptors(footprint.pid(), descriptors)
            # A shared sandbox's helpers may have started meanwhile; their nameless descriptors cannot be told apart.
            left += [f"open descriptor: {one}" for one in more if "/" in one or not kept]
        left = [one for one in left if not any(sandbox[:13] in one for sandbox in kept)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def processes(footprint: Footprint, ids: set[str]) -> Iterator[str]:
    """Find what the daemon started, running or not yet collected: by command line, by parent, by cgroup."""
    daemon = footprint.pid()
    markers = [f"{footprint.run}/".encode(), f"{footprint.root}/".encode()]
    markers += [f"guest=vmruntime-{one[:13]}".encode() for one in ids]
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        if pid in (daemon, os.getpid()):
            continue
        try:
            line = (process / "cmdline").read_bytes()
            state, parent = _stat(process)
            groups = (process / "cgroup").read_text()
        except OSError:
            continue  # it ended while we looked
        ours = any(marker in line for marker in markers) or f":{footprint.cgroup_parent}/" in groups
        if ours or (daemon is not None and parent == daemon):
            command = line.replace(b"\0", b" ").decode(errors="replace")[:200].strip()
            yield f"{pid} {'(not reaped) ' if state == 'Z' else ''}{command}"


def links(footprint: Footprint) -> Iterator[str]:
    """Find interfaces of the host that hang on the daemon's bridge."""
    if not footprint.bridge:
        return
    shown = subprocess.run(["ip", "-j", "link"], stdout=subprocess.PIPE, check=True).stdout
    for link in json.loads(shown):
        if link.get("master") == footprint.bridge:
            yield f"{link['ifname']} on {footprint.bridge}"


def namespaces(ids: set[str]) -> Iterator[str]:
    """Find named network namespaces of the daemon's sandboxes."""
    for one in ids:
        path = Path("/run/netns") / f"vmrt-{one[:13]}"
        if path.exists():
            yield str(path)


def mounts(footprint: Footprint, ids: set[str]) -> Iterator[str]:
    """Find mounts below the daemon's directories or of its sandboxes' namespaces, as we and the daemon see them."""
    tables = ["self", *([str(footprint.pid())] if footprint.pid() else [])]
    names = {f"vmrt-{one[:13]}" for one in ids}
    for table in tables:
        for line in _text(Path("/proc") / table / "mountinfo").splitlines():
            point = Path(line.split()[4])
            if footprint.root in point.parents or footprint.run in point.parents or point.name in names:
                yield str(point)


def sockets(footprint: Footprint) -> Iterator[str]:
    """Find unix sockets bound below the daemon's run directory, listening or connected, except for its own."""
    for line in _text(Path("/proc/net/unix")).splitlines():
        fields = line.split(maxsplit=7)
        path = fields[7] if len(fields) == 8 else ""
        own = path == str(footprint.run / "vmruntime.sock") or f"{footprint.run}/.cri-" in path
        if path.startswith(f"{footprint.base}/") and not own:
            yield path


def loops(footprint: Footprint) -> Iterator[str]:
    """Find loop devices over the daemon's files."""
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        file = _text(backing).strip()
        if file.startswith(f"{footprint.base}/"):
            yield f"/dev/{backing.parts[3]} over {file}"


def cgroups(footprint: Footprint, ids: set[str]) -> Iterator[str]:
    """Find cgroups below the daemon's parent, or named after its sandboxes anywhere in a hierarchy's first levels."""
    names = {f"vmruntime-{one}" for one in ids}
    for hierarchy in hierarchies():
        yield from _found(hierarchy / footprint.cgroup_parent.lstrip("/"), "*/")
        for depth in ("*", "*/*"):
            yield from (one for one in _found(hierarchy, f"{depth}/") if os.path.basename(one) in names)


def _found(directory: Path, pattern: str) -> list[str]:
    """Return what matches a pattern; what goes while it is looked for has gone."""
    while True:
        try:
            return [str(path) for path in directory.glob(pattern)]
        except FileNotFoundError:
            if not directory.exists():
                return []


def files(footprint: Footprint) -> Iterator[str]:
    """Find files and directories below the daemon's two roots that are neither its own nor an image's."""
    layers = {
        f"root/layers/{str(row[0]).removeprefix('sha256:')}.erofs"
        for row in _rows(footprint.root / "vmruntime.db", "SELECT diff_id FROM layers")
    }
    for top in (footprint.root, footprint.run):
        # Unlike rglob(), walk() passes over a directory that goes meanwhile.
        for path in (Path(at, one) for at, below, inside in os.walk(top) for one in (*below, *inside)):
            name = f"{'root' if top == footprint.root else 'run'}/{path.relative_to(top)}"
            own_directory = len(path.relative_to(top).parts) == 1 and not path.name.startswith(".")
            if own_directory and path.is_dir() and not path.is_symlink():
                continue  # what counts is what is in it
            if KEPT.fullmatch(name) is None or (name.startswith("root/layers/") and name not in layers):
                yield name


def rules(footprint: Footprint, ids: set[str]) -> Iterator[str]:
    """Find packet filter rules and chains that name the daemon's network or its sandboxes."""
    chains = {chain for one in ids for chain in cni_chains(footprint.network, one)}
    for command in (["iptables-save"], ["ip6tables-save"], ["nft", "list", "ruleset"]):
        if shutil.which(command[0]) is None:
            continue
        shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout.decode()
        for line in shown.splitlines():
            words = set(re.findall(r"[\w.-]+", line))
            if words & ids or words & chains or (footprint.bridge and footprint.network in words):
                yield line.strip()


def cni_chains(network: str, container_id: str) -> Iterator[str]:
    """Return the chains the CNI plugins make for one container: a prefix and the start of SHA-512 of the two names."""
    digest = hashlib.sha512(f"{network}{container_id}".encode()).hexdigest()
    for prefix in _CNI_CHAIN_PREFIXES:
        yield f"CNI-{prefix}{digest}"[:28]


def reservations(footprint: Footprint, ids: set[str]) -> Iterator[str]:
    """Find addresses that host-local keeps for the daemon's sandboxes: a file an address, with the id in it."""
    for path in _entries(footprint.reservations / footprint.network):
        if path.name.startswith("last_reserved_ip") or path.name == "lock":
            continue
        owner = _text(path).split()[:1]
        if footprint.bridge or set(owner) & ids:
            yield f"{path.name} for {' '.join(owner)}"


def rows(footprint: Footprint) -> Iterator[str]:
    """Find sandboxes, containers and owned resources in the store."""
    database = footprint.root / "vmruntime.db"
    for table in ("sandboxes", "containers"):
        for one in _rows(database, f"SELECT id, json_extract(CAST(record AS TEXT), '$.state') FROM {table}"):
            yield f"{table}: {one[0]} ({one[1]})"
    for kind, key, owner in _rows(database, "SELECT kind, key, owner FROM resources"):
        yield f"resources: {kind} {key} of {owner}"


def open_descriptors(pid: int | None) -> list[str]:
    """Return what a process has open, sockets by path where they have one."""
    paths = {}
    for line in _text(Path("/proc/net/unix")).splitlines()[1:]:
        fields = line.split(maxsplit=7)
        paths[fields[6]] = fields[7] if len(fields) == 8 else "unnamed unix socket"
    found = []
    for entry in _entries(Path(f"/proc/{pid}/fd")) if pid is not None else []:
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if target.startswith(TEMPLATES):
                continue
            inode = target.removeprefix("socket:[").removesuffix("]")
            found.append(f"socket {paths.get(inode, '')}".strip() if target.startswith("socket:") else _kind(target))
    return found


def new_descriptors(pid: int | None, before: Sequence[str]) -> list[str]:
    """Return what a process has open more than before."""
    if pid is None:
        return []
    more = Counter(open_descriptors(pid))
    if more.total() <= len(before):
        return []  # the same number under other names is not a leak: caches, a later daemon
    more.subtract(Counter(before))
    return [f"{count} x {name}" for name, count in more.items() if count > 0]


def below(directory: Path) -> list[str]:
    """Return processes, mounts and loop devices on one directory, for tests without a daemon."""
    found = []
    marker = f"{directory}/".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if marker in command and int(process.name) != os.getpid():
                found.append(
                    f"process: {process.name} {command.replace(bytes(1), b' ').decode(errors='replace')[:200]}"
                )
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        if directory in Path(line.split()[4]).parents:
            found.append(f"mount: {line.split()[4]}")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if _text(backing).startswith(f"{directory}/"):
            found.append(f"loop device: {backing.parts[3]} over {_text(backing).strip()}")
    return found


def _kind(target: str) -> str:
    """Strip what differs from one descriptor to the next of the same kind."""
    return re.sub(r":\[\d+\]$|\[\d+\]$", "", target)


def _stat(process: Path) -> tuple[str, int]:
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1])


def hierarchies() -> Iterator[Path]:
    """Iterate over where cgroups are mounted."""
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] in ("cgroup", "cgroup2"):
            yield Path(left.split()[4])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _entries(directory: Path) -> Iterable[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _rows(database: Path, query: str) -> list[tuple[object, ...]]:
    """Read the store beside the daemon; a store that is not there has no rows."""
    if not database.is_file():
        return []
    try:
        return _query(f"file:{database}?mode=ro", query)
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        if "unable to open" not in str(error):
            raise
        return _query(f"file:{database}?immutable=1", query)  # no daemon runs, so nobody writes


def _query(uri: str, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as connection:
        return connection.execute(query).fetchall()
