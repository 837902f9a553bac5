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

from tests.support import golang
from tests.support.daemon import Daemon
from tests.support.pods import create, run_pod, sh, start, status, wait_exit
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

SOURCE = Path(__file__).parent / "remotecommand"
CLIENT_FAILED = 250
TRANSPORTS = ["spdy", "websocket"]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kubernetes' client and an echo server, built here."""
    go, why_not = golang.find_go(golang.needed_by(SOURCE / "go.mod"))
    if not go:
        pytest.skip(f"Kubernetes' streaming client is not tried: {why_not}")
    directory = tmp_path_factory.mktemp("go")
    golang.build(go, SOURCE, directory / "remotecommand")
    golang.build(go, SOURCE, directory / "echo", "./echo")
    return directory


@pytest.fixture
def client(programs: Path) -> Path:
    return programs / "remotecommand"


class Kubectl:
    """The client and a daemon."""

    def __init__(self, program: Path, daemon: Daemon, transport: str) -> None:
        self._command = [str(program), "-transport", transport]
        self._runtime = daemon.runtime
        self.transport = transport

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
        command = [*self._command, verb, *flags, url] if verb != "forward" else [*self._command, verb, url, *flags]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def attach(self, container: str, *, tty: bool = False, stdin: bool = True) -> subprocess.Popen[bytes]:
        request = cri.AttachRequest(container_id=container, stdin=stdin, stdout=True, stderr=not tty, tty=tty)
        flags = [*(["-stdin"] if stdin else []), *(["-tty"] if tty else [])]
        return self.popen("attach", self._runtime.Attach(request).url, *flags)

    @contextlib.contextmanager
    def forward(self, pod: str, *ports: int) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
        """Forward ports of this machine to ports of a pod; yield the client and the ports here."""
        url = self._runtime.PortForward(cri.PortForwardRequest(pod_sandbox_id=pod)).url
        with self.popen("forward", url, *(f":{port}" for port in ports)) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n", process.communicate(timeout=5)[1]
                yield process, [int(process.stdout.readline()) for _ in ports]
            finally:
                process.kill()


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
    name = f"attach-{kubectl.transport}"
    pod = run_pod(daemon, name)
    script = "echo before; while read line; do echo out-$line; echo err-$line >&2; done; echo end; exit 5"
    container = start(daemon, pod, image, "main", script, stdin=True, stdin_once=True)
    wait_until(lambda: log_text(daemon, name, "main") == ["before"])
    process = kubectl.attach(container)
    assert process.stdin is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert read_until(process, b"out-one\n") == b"out-one\n", "what was said before is not repeated"
    out, err = process.communicate(b"two\n", timeout=60)
    assert (out, err, process.returncode) == (b"out-two\nend\n", b"err-one\nerr-two\n", 0)
    assert wait_exit(daemon, container).exit_code == 5
    lines = ["before", "end", "err-one", "err-two", "out-one", "out-two"]
    wait_until(lambda: sorted(log_text(daemon, name, "main")) == lines)


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
    """It is waited for, so that one who reads slowly gets everything, but not for long: the log goes on, complete."""
    lines, pod = 3000, run_pod(daemon, "stuck")
    script = f"x=$(printf %08000d 0); i=0; while [ $i -lt {lines} ]; do echo $i-$x; i=$((i+1)); done; exit 4"
    container = create(daemon, pod, image, "main", script)
    process = Kubectl(client, daemon, "spdy").attach(container, stdin=False)
    time.sleep(1)
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    wait_until(lambda: status(daemon, container).state == cri.CONTAINER_EXITED, 120)
    assert status(daemon, container).exit_code == 4
    wait_until(lambda: len(log_text(daemon, "stuck", "main")) == lines)
    assert [line.split("-")[0] for line in log_text(daemon, "stuck", "main")] == [str(n) for n in range(lines)]
    out, err = process.communicate(timeout=60)
    assert process.returncode == CLIENT_FAILED
    assert b"did not take the output" in err
    assert out.startswith(b"0-0000")
    assert len(out) < lines * 8000


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


def test_port_forward(daemon: Daemon, image: str, kubectl: Kubectl, programs: Path) -> None:
    """To what listens on loopback only, many connections at once, both ways, with half-close."""
    pod = run_pod(daemon, "ports")
    container = start(daemon, pod, image, "main", "mkdir /tmp/www; echo page >/tmp/www/index.html; sleep 1000")
    echo = (programs / "echo").read_bytes()
    assert kubectl.exec(container, "cat >/tmp/echo && chmod +x /tmp/echo", stdin=echo).returncode == 0
    servers = "httpd -p 127.0.0.1:8080 -h /tmp/www; /tmp/echo 127.0.0.1:7000 [::1]:7001 >/dev/null 2>&1 &"
    assert kubectl.exec(container, servers).returncode == 0
    wait_until(lambda: sh(daemon, container, "nc ::1 7001 </dev/null").exit_code == 0)
    with kubectl.forward(pod, 8080, 7000, 7001) as (process, (web, four, six)):
        assert talk(web, b"GET / HTTP/1.0\r\n\r\n").endswith(b"page\n")
        payloads = [os.urandom(100_000 + n) for n in range(32)]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            assert list(pool.map(lambda data: talk(four, data), payloads)) == payloads
        big = os.urandom(4_000_000)
        assert talk(six, big) == big
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors.count(b"error")) == (0, 0)


def test_a_refused_port_is_told(daemon: Daemon, image: str, kubectl: Kubectl) -> None:
    pod = run_pod(daemon, "refused")
    with kubectl.forward(pod, 9) as (process, (port,)):
        assert talk(port, b"x") == b""
        # Kubernetes' client ends the session over it, by itself.
        assert process.wait(30) == CLIENT_FAILED
        assert process.stderr is not None
        assert b"connection refused" in process.stderr.read()
