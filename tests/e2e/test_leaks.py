"""The leak check itself: it finds what belongs to a daemon, of every kind, and nothing of another."""

from __future__ import annotations

import secrets
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.daemon import Daemon

pytestmark = [pytest.mark.root, pytest.mark.vm]

ID = secrets.token_hex(32)


def command(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def process(daemon: Daemon, undo: ExitStack) -> str:
    running = subprocess.Popen(["sh", "-c", "sleep 60; true", f"{daemon.run}/sandboxes/x"])
    undo.callback(running.wait)
    undo.callback(running.kill)
    return f"process: {running.pid}"


def link(daemon: Daemon, undo: ExitStack) -> str:
    bridge, name = daemon.footprint.bridge, f"x{secrets.token_hex(4)}"
    command("ip", "link", "add", bridge, "type", "bridge")
    undo.callback(command, "ip", "link", "delete", bridge)
    command("ip", "link", "add", name, "master", bridge, "type", "veth", "peer", "name", f"{name}p")
    undo.callback(command, "ip", "link", "delete", name)
    return f"link: {name} on {bridge}"


def namespace(daemon: Daemon, undo: ExitStack) -> str:
    name = f"vmrt-{ID[:13]}"
    command("ip", "netns", "add", name)
    undo.callback(command, "ip", "netns", "delete", name)
    return f"network namespace: /run/netns/{name}"


def mount(daemon: Daemon, undo: ExitStack) -> str:
    point = daemon.root / "pods" / "mnt"
    point.mkdir()
    undo.callback(point.rmdir)
    command("mount", "-t", "tmpfs", "none", str(point))
    undo.callback(command, "umount", str(point))
    return f"mount: {point}"


def unix_socket(daemon: Daemon, undo: ExitStack) -> str:
    server = undo.enter_context(socket.socket(socket.AF_UNIX))
    server.bind(str(daemon.run / "sandboxes" / "s"))
    undo.callback((daemon.run / "sandboxes" / "s").unlink)
    return f"unix socket: {daemon.run}/sandboxes/s"


def loop(daemon: Daemon, undo: ExitStack) -> str:
    file = daemon.root / "pods" / "disk.img"
    file.write_bytes(bytes(1 << 20))
    undo.callback(file.unlink)
    device = subprocess.run(["losetup", "--find", "--show", str(file)], check=True, stdout=subprocess.PIPE).stdout
    undo.callback(command, "losetup", "--detach", device.decode().strip())
    return f"loop device: {device.decode().strip()} over {file}"


def cgroup(daemon: Daemon, undo: ExitStack) -> str:
    hierarchy = next(path for path in leaks.hierarchies() if (path / "cgroup.procs").exists())
    path = hierarchy / daemon.footprint.cgroup_parent.lstrip("/") / "pod"
    path.mkdir(parents=True)
    undo.callback(path.parent.rmdir)
    undo.callback(path.rmdir)
    return f"cgroup: {path}"


def file(daemon: Daemon, undo: ExitStack) -> str:
    path = daemon.root / "layers" / f"{ID}.erofs"  # named like a layer, but no image has it
    path.write_bytes(b"x")
    undo.callback(path.unlink)
    return f"file: root/layers/{ID}.erofs"


def rule(daemon: Daemon, undo: ExitStack) -> str:
    chain = next(leaks.cni_chains(daemon.footprint.network, ID))
    command("iptables", "-t", "nat", "-N", chain)
    undo.callback(command, "iptables", "-t", "nat", "-X", chain)
    return f"packet filter rule: :{chain} -"


def reservation(daemon: Daemon, undo: ExitStack) -> str:
    path = daemon.footprint.reservations / daemon.footprint.network / "10.1.2.3"
    path.parent.mkdir(parents=True)
    path.write_text(f"{ID}\r\neth0")
    undo.callback(path.unlink)
    return f"address reservation: 10.1.2.3 for {ID}"


@pytest.fixture
def idle(base: Path) -> Daemon:
    """A daemon's directories as they are while it does not run, with a sandbox's id in its log."""
    daemon = Daemon(base / secrets.token_hex(2))
    for directory in (daemon.root / "pods", daemon.root / "layers", daemon.run / "sandboxes"):
        directory.mkdir(parents=True)
    daemon.log.write_text(f"sandbox ready sandbox={ID}\n")
    return daemon


@pytest.mark.parametrize(
    "make",
    [process, link, namespace, mount, unix_socket, loop, cgroup, file, rule, reservation],
    ids=lambda f: f.__name__,
)
def test_each_kind_is_found(idle: Daemon, base: Path, make: Callable[[Daemon, ExitStack], str]) -> None:
    other = Daemon(base / secrets.token_hex(2))
    assert leaks.find(idle.footprint) == set()
    with ExitStack() as undo:
        expected = make(idle, undo)
        found = leaks.find(idle.footprint)
        assert [one for one in found if one.startswith(expected)], found
        assert leaks.find(other.footprint) == set()
    assert leaks.settle(idle.footprint, set()) == []


def test_rows_and_descriptors_are_found(daemon: Daemon) -> None:
    before = leaks.open_descriptors(daemon.pid)
    assert leaks.new_descriptors(daemon.pid, before) == []
    fewer = [one for one in before if not one.endswith("vmruntime.db")]
    assert any(one.endswith("vmruntime.db") for one in leaks.new_descriptors(daemon.pid, fewer))
    assert list(leaks.rows(daemon.footprint)) == []
