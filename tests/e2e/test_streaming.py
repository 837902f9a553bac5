"""Exec, attach and port-forward with Kubernetes' own client (remotecommand/), over SPDY and WebSocket."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_pod import create, run_pod, sh, start, status, wait_exit
from tests.support import golang
from tests.support.daemon import Daemon
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

SOURCE = Path(__file__).parent / "remotecommand"
CLIENT_FAILED = 250
TRANSPORTS = ["spdy", "websocket"]


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kubernetes' client, built here."""
    go, why_not = golang.find_go(golang.needed_by(SOURCE / "go.mod"))
    if not go:
        pytest.skip(f"Kubernetes' streaming client is not tried: {why_not}")
    target = tmp_path_factory.mktemp("go") / "remotecommand"
    golang.build(go, SOURCE, target)
    return target


@pytest.fixture
def image(daemon: Daemon, busybox: str) -> str:
    answer = daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox)))
    return str(answer.image_ref)


class Kubectl:
    """The client and a daemon."""

    def __init__(self, program: Path, daemon: Daemon, transport: str) -> None:
        self._command = [str(program), "-transport", transport]
        self._runtime = daemon.runtime

    def exec(
        self, container: str, script: str, *flags: str, stdin: bytes | None = None, tty: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        request = cri.ExecRequest(
            container_id=container,
            cmd=["/bin/sh", "-c", script],
            stdin=stdin is not None,
            stdout=True,
            stderr=not tty,
            tty=tty,
        )
        url = self._runtime.Exec(request).url
        options = [*flags, *(["-stdin"] if stdin is not None else []), *(["-tty"] if tty else [])]
        command = [*self._command, "exec", *options, url]
        return subprocess.run(command, input=stdin or b"", capture_output=True, timeout=120, check=False)

    def popen(self, verb: str, url: str, *flags: str) -> subprocess.Popen[bytes]:
        command = [*self._command, verb, *flags, url]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def attach(self, container: str, *, tty: bool = False, stdin: bool = True) -> subprocess.Popen[bytes]:
        request = cri.AttachRequest(container_id=container, stdin=stdin, stdout=True, stderr=not tty, tty=tty)
        flags = [*(["-stdin"] if stdin else []), *(["-tty"] if tty else [])]
        return self.popen("attach", self._runtime.Attach(request).url, *flags)

    @contextlib.contextmanager
    def forward(self, pod: str, *ports: int) -> Iterator[list[int]]:
        url = self._runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod)).url
        command = [*self._command, "forward", url, *(f":{port}" for port in ports)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n", process.communicate(timeout=5)[1]
            yield [int(process.stdout.readline()) for _ in ports]
            _, errors = process.communicate(timeout=30)
            assert process.returncode == 0, errors
        finally:
            process.kill()
            process.wait()


@pytest.fixture(params=TRANSPORTS)
def kubectl(request: pytest.FixtureRequest, client: Path, daemon: Daemon) -> Kubectl:
    return Kubectl(client, daemon, request.param)


def wait_until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_until(process: subprocess.Popen[bytes], text: bytes) -> bytes:
    """Read the client's output until a text has come."""
    assert process.stdout is not None
    found = b""
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        while text not in found:
            data = os.read(process.stdout.fileno(), 65536)
            assert data, found
            found += data
    finally:
        timer.cancel()
    return found


def log_text(daemon: Daemon, pod: str, name: str) -> list[str]:
    path = daemon.base / "logs" / pod / f"{name}.log"
    return [line.split(" ", 3)[3] for line in path.read_text().splitlines()]


def test_exec(daemon: Daemon, image: str, kubectl: Kubectl) -> None:
    container = start(daemon, run_pod(daemon, "exec"), image, "main", "sleep 1000")

    done = kubectl.exec(container, "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert kubectl.exec(container, "true").returncode == 0
    killed = kubectl.exec(container, "kill -9 $$")
    assert killed.returncode == 137

    data = os.urandom(6_000_000)
    echoed = kubectl.exec(container, "cat", stdin=data)
    assert echoed.returncode == 0, echoed.stderr
    assert hashlib.sha256(echoed.stdout).digest() == hashlib.sha256(data).digest()
    summed = kubectl.exec(container, "sha256sum", stdin=data)
    assert summed.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()

    both = kubectl.exec(container, "seq 1 100000; seq 1 100000 >&2")
    expected = "".join(f"{n}\n" for n in range(1, 100001)).encode()
    assert (both.returncode, both.stdout == expected, both.stderr == expected) == (0, True, True)


def test_exec_on_a_terminal(daemon: Daemon, image: str, kubectl: Kubectl) -> None:
    container = start(daemon, run_pod(daemon, "tty"), image, "main", "sleep 1000")
    script = 'until [ "$(stty size)" = "33 77" ]; do sleep 0.1; done; stty size; test -t 2'
    done = kubectl.exec(container, script, "-size", "77x33", stdin=b"", tty=True)
    assert done.returncode == 0, done.stderr
    assert b"33 77\r\n" in done.stdout
    typed = kubectl.exec(container, "read line; echo got-$line", stdin=b"words\n", tty=True)
    assert b"got-words\r\n" in typed.stdout


def test_a_client_that_goes_away_kills_its_command(daemon: Daemon, image: str, kubectl: Kubectl) -> None:
    container = start(daemon, run_pod(daemon, "gone"), image, "main", "sleep 1000")
    request = cri.ExecRequest(
        container_id=container,
        cmd=["/bin/sh", "-c", "echo here; sleep 777; true"],
        stdin=True,
        stdout=True,
        stderr=True,
    )
    process = kubectl.popen("exec", daemon.runtime.Exec(request).url, "-stdin")
    read_until(process, b"here\n")
    assert b"sleep 777" in sh(daemon, container, "ps").stdout
    process.kill()
    process.communicate()
    wait_until(lambda: b"sleep 777" not in sh(daemon, container, "ps").stdout)


def test_attach_beside_the_log(daemon: Daemon, image: str, kubectl: Kubectl) -> None:
    """stdin reaches the container, its end ends the container (stdin_once); the log has every line all the same."""
    pod = run_pod(daemon, "attach")
    script = "echo before; while read line; do echo out-$line; echo err-$line >&2; done; echo end; exit 5"
    container = start(daemon, pod, image, "main", script, stdin=True, stdin_once=True)
    wait_until(lambda: log_text(daemon, "attach", "main") == ["before"])
    process = kubectl.attach(container)
    assert process.stdin is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert read_until(process, b"out-one\n") == b"out-one\n", "what was said before is not repeated"
    out, err = process.communicate(b"two\n", timeout=60)
    assert (out, err, process.returncode) == (b"out-two\nend\n", b"err-one\nerr-two\n", 0)
    assert wait_exit(daemon, container).exit_code == 5
    lines = ["before", "end", "err-one", "err-two", "out-one", "out-two"]
    wait_until(lambda: sorted(log_text(daemon, "attach", "main")) == lines)


def test_attach_again_and_to_a_terminal(daemon: Daemon, image: str, kubectl: Kubectl) -> None:
    pod = run_pod(daemon, "again")
    many = start(daemon, pod, image, "many", "while read line; do echo out-$line; done", stdin=True)
    for word in (b"one", b"two"):
        process = kubectl.attach(many)
        out, err = process.communicate(word + b"\n", timeout=60)
        assert (out, err, process.returncode) == (b"out-" + word + b"\n", b"", 0)
    assert status(daemon, many).state == cri.CONTAINER_RUNNING

    terminal = create(
        daemon, pod, image, "term", "printf 'prompt> '; read line; stty size; exit 3", stdin=True, tty=True
    )
    process = kubectl.attach(terminal, tty=True)
    time.sleep(1)  # attached before the start, so the prompt is not missed
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=terminal))
    read_until(process, b"prompt> ")
    assert process.stdin is not None
    process.stdin.write(b"x\n")
    process.stdin.flush()
    assert wait_exit(daemon, terminal).exit_code == 3
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_viewer_that_does_not_read_does_not_stop_the_log(daemon: Daemon, image: str, client: Path) -> None:
    pod = run_pod(daemon, "stuck")
    container = create(daemon, pod, image, "main", "seq 1 400000; exit 4")
    process = Kubectl(client, daemon, "spdy").attach(container, stdin=False)
    time.sleep(1)
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    wait_until(lambda: status(daemon, container).state == cri.CONTAINER_EXITED, 120)
    assert status(daemon, container).exit_code == 4
    wait_until(lambda: log_text(daemon, "stuck", "main")[-1:] == ["400000"])
    assert log_text(daemon, "stuck", "main") == [str(n) for n in range(1, 400001)]
    process.kill()
    process.communicate()


def talk(port: int, data: bytes) -> bytes:
    """Send, half-close, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        sender = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
        sender.start()
        found = bytearray()
        while chunk := connection.recv(65536):
            found += chunk
        sender.join()
    return bytes(found)


def test_port_forward(daemon: Daemon, image: str, kubectl: Kubectl) -> None:
    """To what listens on loopback only, many connections at once, both ways, with half-close."""
    pod = run_pod(daemon, "ports")
    script = "mkdir /www; echo page >/www/index.html; httpd -p 127.0.0.1:8080 -h /www; exec nc -ll -p 7000 -e /bin/cat"
    container = start(daemon, pod, image, "main", script)
    wait_until(lambda: sh(daemon, container, "nc 127.0.0.1 7000 </dev/null").exit_code == 0)
    with kubectl.forward(pod, 8080, 7000) as (web, echo):
        assert talk(web, b"GET / HTTP/1.0\r\n\r\n").endswith(b"page\n")
        payloads = [os.urandom(100_000 + n) for n in range(16)]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda data: talk(echo, data), payloads)) == payloads
        big = os.urandom(4_000_000)
        assert talk(echo, big) == big


def test_a_refused_port_is_told(daemon: Daemon, image: str, kubectl: Kubectl) -> None:
    pod = run_pod(daemon, "refused")
    with pytest.raises(AssertionError, match="connection refused"), kubectl.forward(pod, 9) as (port,):
        assert talk(port, b"x") == b""
