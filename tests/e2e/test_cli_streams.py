"""The command line's exec, attach, run -it, port-forward and cp, against a daemon and a VM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.test_streaming import talk, wait_until
from tests.support.daemon import Daemon
from tests.support.pods import run_pod, sh, start, status
from tests.support.screen import argv, at_a_terminal, vmruntime
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm


# A shell as plain as can be: BusyBox's own line editor converses with the terminal.
SHELL = """trap : INT; printf 'ready> '; while :; do read -r line && eval "$line"; printf 'ready> '; done"""


@pytest.fixture
def container(daemon: Daemon, image: str) -> str:
    return start(daemon, run_pod(daemon, "web"), image, "main", "sleep 1000")


def test_exec(daemon: Daemon, container: str) -> None:
    done = vmruntime(daemon, "exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"out\n", b"err\n")
    data = os.urandom(3_000_000)
    assert vmruntime(daemon, "exec", "-i", "web", "cat", stdin=data).stdout == data
    missing = vmruntime(daemon, "exec", "web", "no-such-command")
    assert missing.returncode == 127
    assert b"not found" in missing.stderr


def test_exec_at_a_terminal(daemon: Daemon, container: str) -> None:
    command = argv(daemon, "exec", "-it", "web", "sh", "-c", SHELL)
    with at_a_terminal(command, 90, 30) as screen:
        screen.wait_for(rb"ready> ")
        screen.type(b"stty size\n")
        screen.wait_for(rb"30 90\r\n")
        screen.resize(101, 31)
        os.kill(screen.process.pid, signal.SIGWINCH)
        screen.type(b'until [ "$(stty size)" = "31 101" ]; do sleep 0.1; done; echo fi""ts\n')
        screen.wait_for(rb"fits\r\n")
        screen.type(b"sleep 1000\n")
        wait_until(lambda: b"sleep 1000" in sh(daemon, container, "ps | grep -v PID").stdout)
        time.sleep(0.5)
        screen.type(b"\x03")  # reaches the sleep, not this command
        screen.type(b"echo still-$((40+2)); exit 7\n")
        screen.wait_for(rb"still-42\r\n")
        assert screen.end() == 7


def test_run_and_attach_at_a_terminal(daemon: Daemon, image: str) -> None:
    command = argv(daemon, "run", "-it", "--name", "shell", image, "sh", "-c", SHELL)
    try:
        with at_a_terminal(command, 80, 24) as screen:
            screen.wait_for(rb"ready> ")
            screen.type(b"stty size; X=kept\n")
            screen.wait_for(rb"24 80\r\n")
            screen.type(b"\x10\x11")
            screen.wait_for(rb"the container goes on")
            assert screen.end() == 0
        with at_a_terminal(argv(daemon, "attach", "shell"), 70, 20) as again:
            again.type(b"\n")  # typed ahead: the command may not have read its first line of code
            again.wait_for(rb"ready> ")
            again.type(b"echo $X; stty size; exit 3\n")
            again.wait_for(rb"kept\r\n")
            again.wait_for(rb"20 70\r\n")
            assert again.end() == 3
    finally:
        removed = vmruntime(daemon, "rm", "-f", "shell")
    assert removed.returncode == 0


def test_run_with_input_and_rm(daemon: Daemon, image: str) -> None:
    data = b"line\n" * 100_000
    done = vmruntime(daemon, "run", "--rm", "-i", "--name", "counted", image, "sh", "-c", "wc -c; exit 6", stdin=data)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (6, str(len(data)).encode(), b"")
    assert all(
        pod.metadata.name != "counted" for pod in daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items
    )


def test_port_forward(daemon: Daemon, container: str) -> None:
    sh(daemon, container, "mkdir /tmp/www; echo page >/tmp/www/index.html; httpd -p 127.0.0.1:8080 -h /tmp/www")
    with subprocess.Popen(argv(daemon, "port-forward", "web", ":8080"), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split(b" ")[0].split(b":")[1])
            for _ in range(5):
                assert talk(port, b"GET / HTTP/1.0\r\n\r\n").endswith(b"page\n")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()


def test_cp(daemon: Daemon, container: str, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "data").write_bytes(os.urandom(2_000_000))
    (source / "link").symlink_to("sub/data")
    assert vmruntime(daemon, "cp", source, "web:/tmp").returncode == 0
    assert vmruntime(daemon, "cp", source, "main:/tmp/other").returncode == 0
    assert (
        sh(daemon, container, "ls /tmp/tree /tmp/other").stdout == b"/tmp/other:\nlink\nsub\n\n/tmp/tree:\nlink\nsub\n"
    )
    back = tmp_path / "back"
    assert vmruntime(daemon, "cp", "web:/tmp/other", back).returncode == 0
    assert (back / "sub" / "data").read_bytes() == (source / "sub" / "data").read_bytes()
    assert os.readlink(back / "link") == "sub/data"
    missing = vmruntime(daemon, "cp", "web:/none", tmp_path / "x")
    assert missing.returncode == 1
    assert b"none" in missing.stderr
    assert status(daemon, container).state == cri.CONTAINER_RUNNING
