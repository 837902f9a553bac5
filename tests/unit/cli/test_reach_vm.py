"""Ways to a VM: its screen, its sshd, its buttons."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.unit.cli.conftest import Cli


class Screen:
    """A VNC server of sorts: answers every connection with what it was told, in capitals."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            client, _ = self._server.accept()
            with client:
                if (said := client.recv(100)) == b"end":
                    return
                client.sendall(said.upper())

    def close(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"end")
        self._thread.join(5)
        self._server.close()


@pytest.fixture
def screen(cli: Cli) -> Iterator[Path]:
    pod = cli.cri.add_pod("vm")
    path = cli.base / "run" / "sandboxes" / pod[:13] / "vnc.sock"
    server = Screen(path)
    yield path
    server.close(path)


def install(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    program = directory / name
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(0o755)


VIEWER = """
import socket, sys
host, port = sys.argv[1].removeprefix("vnc://").replace("::", ":").rsplit(":", 1)
with socket.create_connection((host.strip("[]"), int(port))) as end:
    end.sendall(b"hello")
    end.shutdown(socket.SHUT_WR)
    sys.exit(0 if end.recv(100) + end.recv(100) == b"HELLO" else 9)
"""


@pytest.mark.parametrize("name", ["remote-viewer", "vncviewer"])
def test_vnc_with_a_viewer(cli: Cli, screen: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    install(tmp_path / "bin", name, VIEWER)
    result = cli("vnc", "--viewer", "vm")
    assert result.exit_code == 0, result.output
    assert "vnc://127.0.0.1:" in result.stderr


def test_vnc_viewers_end_is_the_commands(
    cli: Cli, screen: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    result = cli("vnc", "--viewer", "vm")
    assert (result.exit_code, "no VNC viewer is installed" in result.stderr) == (1, True)
    install(tmp_path / "bin", "vncviewer", "raise SystemExit(3)")
    assert cli("vnc", "--viewer", "vm").exit_code == 3


def test_vnc_until_interrupted(cli: Cli, screen: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("vnc", "--port", str(port), "vm")
        assert (result.exit_code, f"cannot listen on 127.0.0.1 port {port}" in result.stderr) == (1, True)
    answers: list[bytes] = []

    def watch() -> None:
        while not answers:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as end:
                    end.sendall(b"abc")
                    answers.append(end.recv(3))
            except ConnectionRefusedError:
                threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    result = cli("vnc", "--port", str(port), "vm")
    thread.join(10)
    assert answers == [b"ABC"]
    assert (result.stdout, result.exit_code) == (f"vnc://127.0.0.1:{port}\n", 130)


def test_vnc_of_a_vm_that_ended_meanwhile(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, screen: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    install(tmp_path / "bin", "vncviewer", f"import os; os.rename({str(screen)!r}, {str(screen)!r} + '2')\n{VIEWER}")
    result = cli("vnc", "--viewer", "vm")
    screen.with_name("vnc.sock2").rename(screen)
    assert result.exit_code != 0
    assert "the VM shows no screen: No such file or directory" in result.stderr


def test_vnc_without_a_screen(cli: Cli) -> None:
    pod = cli.cri.add_pod("web")
    result = cli("vnc", "web")
    assert (result.exit_code, "it is not of the kind image" in result.stderr) == (1, True)
    cli.cri.pod_info = {"kind": "image"}
    assert 'annotation vmruntime.io/vnc: "true"' in cli("vnc", "web").stderr
    cli.cri.pods[pod].annotations["vmruntime.io/vnc"] = "true"
    assert "does not run" in cli("vnc", "web").stderr


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What `ssh` was called with; a program of that name is on PATH and never runs."""
    install(tmp_path / "bin", "ssh", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, argv: calls.append(argv))
    return calls


def test_ssh(cli: Cli, executed: list[list[str]], tmp_path: Path) -> None:
    pod = cli.cri.add_pod("vm")
    assert cli("ssh", "vm").exit_code == 0
    known_hosts = cli.base / "run" / "sandboxes" / pod[:13] / "known_hosts"
    assert executed[-1] == [
        str(tmp_path / "bin" / "ssh"),
        "-o", f"UserKnownHostsFile={known_hosts}", "-o", "GlobalKnownHostsFile=/dev/null",
        "-o", f"HostKeyAlias={pod[:13]}", "-o", "StrictHostKeyChecking=accept-new", "-o", "LogLevel=ERROR",
        "-p", "22", "-l", "root", "--", "10.88.0.2",
    ]  # fmt: skip
    key = tmp_path / "a key"
    key.touch()
    assert cli("ssh", "-p", "2222", "-i", key, "debian@vm", "--", "ls", "-l").exit_code == 0
    assert executed[-1][-8:] == ["-p", "2222", "-l", "debian", "--", "10.88.0.2", "ls", "-l"]
    assert f'IdentityFile="{key}"' in executed[-1]
    assert cli("ssh", "-l", "admin", "debian@vm", "ls").exit_code == 0
    assert executed[-1][-5:] == ["-l", "admin", "--", "10.88.0.2", "ls"]


def test_ssh_that_cannot_be(cli: Cli, executed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    pod = cli.cri.add_pod("vm")
    assert "no pod has the id or name" in cli("ssh", "none").stderr
    cli.cri.pods[pod].network.ip = ""
    assert "has no address" in cli("ssh", "vm").stderr
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "no ssh client is installed" in cli("ssh", "vm").stderr
    assert not executed


def test_ssh_waits_for_an_sshd(cli: Cli, executed: list[list[str]]) -> None:
    pod = cli.cri.add_pod("vm")
    cli.cri.pods[pod].network.ip = "127.0.0.1"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            # Like a guest that is booting: at first it only closes.
            server.accept()[0].close()
            client = server.accept()[0]
            client.sendall(b"SSH-2.0-test\r\n")
            client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert cli("ssh", "-p", str(port), "--wait", "20", "vm").exit_code == 0
        thread.join(5)
    assert len(executed) == 1
    result = cli("ssh", "-p", str(port), "--wait", "1", "vm")
    assert (result.exit_code, f"no sshd on 127.0.0.1 port {port} after 1 s" in result.stderr) == (1, True)
    assert len(executed) == 1


def test_the_buttons_of_machines(cli: Cli) -> None:
    first, second = cli.cri.add_pod("a"), cli.cri.add_pod("b")
    for name in ("pause", "resume", "reset"):
        result = cli(name, "a", second[:10])
        assert (result.stdout.split(), result.exit_code) == ([first, second], 0)
    assert cli.cri.machines == [(name, pod) for name in ("pause", "resume", "reset") for pod in (first, second)]
    assert cli("reset", "a", "typo").exit_code == 1
    assert len(cli.cri.machines) == 6
    cli.cri.failures["PauseMachine"] = (grpc.StatusCode.FAILED_PRECONDITION, "the VM does not run")
    result = cli("pause", "a")
    assert (result.exit_code, result.stderr) == (1, "error: the VM does not run\n")


def test_a_guest_has_more_time_to_shut_down(cli: Cli) -> None:
    for name, options, seconds in (("web", [], 10), ("vm", [], 30), ("impatient", ["-t", "3"], 3)):
        pod = cli.cri.add_pod(name)
        if name != "web":
            cli.cri.pods[pod].annotations["vmruntime.io/kind"] = "image"
        cli.cri.add_container(pod, "one")
        assert cli("stop", *options, name).exit_code == 0
        assert cli.cri.requests["StopContainer"].timeout == seconds
