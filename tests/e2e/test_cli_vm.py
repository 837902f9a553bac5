"""Image pods by hand: every command that has to do with them, against a daemon and a real machine."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leaks, vm_images
from tests.support.daemon import Daemon
from tests.support.image_pods import image_daemon, ssh_key
from tests.support.screen import argv, at_a_terminal, vmruntime

pytestmark = pytest.mark.vm

SIZE = ("-m", "256M")
UP = rb"up after [\d.]+ s"


@pytest.fixture(scope="module")
def vms(base: Path) -> Iterator[Daemon]:
    with image_daemon(base / "clivm", {}) as daemon:
        image = said(daemon, "image", "import", "-q", vm_images.small()).strip()
        # What the daemon opens for its first machine, and keeps for all of them, is no leak.
        said(daemon, "run", "-d", "--vm", "--name", "first", "--no-ssh-key", *SIZE, vm_images.small())
        said(daemon, "rm", "-f", "first")
        yield daemon
        said(daemon, "image", "rm", image)


@pytest.fixture(autouse=True)
def clean(vms: Daemon) -> Iterator[None]:
    with leaks.nothing_left(vms.footprint, lambda: vms.remove_all_but(frozenset())):
        yield


def said(daemon: Daemon, *arguments: object) -> str:
    """Run a command that succeeds and return what it says."""
    done = vmruntime(daemon, *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def machine_of(daemon: Daemon, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(said(daemon, "inspect", name))[0]["info"]["info"]["machine"]
    return found


def test_a_file_is_booted_and_its_console_joined(vms: Daemon) -> None:
    command = argv(vms, "run", "--rm", "--vm", "--no-ssh-key", *SIZE, "-it", vm_images.small())
    with at_a_terminal(command, 80, 24) as screen:
        screen.wait_for(UP)
        screen.type(b"echo sum-$((40+2))\r")
        screen.wait_for(b"sum-42")
        screen.type(b"poweroff -f\r")
        assert screen.end() == 0
    assert said(vms, "list", "-q") == ""


def test_ctrl_c_is_the_power_button(vms: Daemon) -> None:
    command = argv(vms, "run", "--rm", "--vm", "--no-ssh-key", *SIZE, vm_images.small())
    with at_a_terminal(command, 80, 24) as screen:
        screen.wait_for(UP)
        screen.process.send_signal(signal.SIGINT)
        screen.wait_for(b"stopping, at most 30 s")
        screen.wait_for(b"Power down")
        assert screen.end() == 0


def test_a_machine_by_hand(vms: Daemon, base: Path, tmp_path: Path) -> None:
    key, _ = ssh_key(tmp_path)
    data = tmp_path / "user-data"
    data.write_text("#cloud-config\nwrite_files:\n- {path: /etc/greeting, content: by hand}\n")
    said(
        vms, "run", "-d", "--vm", "--name", "hand", "--vnc", *SIZE, "--ssh-key", f"{key}.pub", "--user-data", data,
        "--root-size", "1G", vm_images.small(),
    )  # fmt: skip
    assert "  image  " in said(vms, "list")
    log_in = ("ssh", "--wait", "120", "-i", key, "hand", "--")
    assert said(vms, *log_in, "cat /etc/greeting") == "by hand"
    assert b"up after" in vmruntime(vms, "console", "hand").stdout
    assert vmruntime(vms, *log_in, "exit 7").returncode == 7

    with at_a_terminal(argv(vms, "console", "-i", "hand"), 80, 24) as screen:
        screen.wait_for(b"Ctrl-] leaves")
        screen.type(b"echo sum-$((40+2))\r")
        screen.wait_for(b"sum-42")
        screen.type(b"\x1d")
        screen.wait_for(b"the VM goes on")
        assert screen.end() == 0

    with subprocess.Popen(argv(vms, "vnc", "hand"), stdout=subprocess.PIPE, text=True) as viewing:
        assert viewing.stdout is not None
        host, _, port = viewing.stdout.readline().strip().removeprefix("vnc://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as screen_end:
            assert screen_end.recv(4) == b"RFB "
        viewing.send_signal(signal.SIGINT)

    said(vms, "pause", "hand")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(argv(vms, *log_in, "true"), timeout=4, check=False, capture_output=True)
    said(vms, "resume", "hand")
    assert said(vms, *log_in, "echo awake") == "awake\n"
    said(vms, "reset", "hand")
    assert said(vms, *log_in, "echo again") == "again\n"
    assert machine_of(vms, "hand")["reboots"] == 1

    archive = tmp_path / "found.tar.gz"
    said(vms, "diag", "-o", archive, "hand")
    with tarfile.open(archive) as tar:
        names = {Path(name).name for name in tar.getnames()}
    if machine_of(vms, "hand")["driver"] == "libvirt":
        assert [name for name in names if name.endswith(".xml")]
    assert {"pod.json", "console.log", "processes.txt", "network.txt", "qemu-img.txt", "doctor.json"} <= names

    # One that is paused is let go on, or it could not shut down.
    said(vms, "pause", "hand")
    said(vms, "stop", "hand")
    assert "exited (0)" in said(vms, "list")
    said(vms, "rm", "hand")
