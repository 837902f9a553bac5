"""Commands that join streams: exec, attach, run -i, port-forward, cp, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from fcntl import ioctl
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Cli
from tests.unit.streaming.fakes import FakeProcess, echo, forever
from vmruntime.cli.copying import Place
from vmruntime.cli.forwarding import Forward
from vmruntime.cli.sessions import exit_status
from vmruntime.cli.terminal import DetachKeys
from vmruntime.errors import Internal, InvalidArgument, Unavailable
from vmruntime.generated import cri_pb2


@pytest.fixture
def container(cli: Cli) -> str:
    return cli.cri.add_container(cli.cri.add_pod("web"), "app")


def test_exec_passes_stdin_on_to_its_end(cli: Cli, container: str) -> None:
    text = "line\n" * 200_000
    result = cli("exec", "-i", "web", "cat", input=text)
    assert (result.exit_code, result.stdout == text) == (0, True)
    assert cli.cri.requests["Exec"].stdin


def test_exec_on_a_terminal_has_one_output(cli: Cli, container: str) -> None:
    assert cli("exec", "-t", "web", "true").exit_code == 0
    assert (cli.cri.requests["Exec"].tty, cli.cri.requests["Exec"].stderr) == (True, False)


def test_exec_is_killed_when_its_time_is_up(cli: Cli, container: str) -> None:
    result = cli("exec", "--timeout", "1", "web", "sleep", "60")
    assert result.exit_code == 1
    assert "killed after 1 s" in result.stderr
    deadline = time.monotonic() + 10
    while not cli.cri.streams.pods.killed.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_that_is_not_there(cli: Cli, container: str) -> None:
    result = cli("exec", "web", "no-such-command")
    assert (result.exit_code, result.stderr) == (127, "not found\n")


def test_exec_at_a_real_terminal(cli: Cli, container: str) -> None:
    """Raw mode while it runs, the terminal's size passed on, everything as before afterwards."""

    async def script(process: FakeProcess) -> None:
        await process.resized.wait()
        size = process.sizes[-1]
        await process.say(f"{size.columns}x{size.rows}\r\n".encode())
        await process.say(b"got " + await process.read() + b"\r\n")
        await process.exit(5)

    cli.cri.streams.pods.script = script
    ours, theirs = pty.openpty()
    ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    before = termios.tcgetattr(theirs)
    argv = [sys.executable, "-m", "vmruntime.cli.main", "--config", str(cli.config), "exec", "-it", "web", "sh"]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    found = b""
    timer = threading.Timer(60, process.kill)
    timer.start()
    while b"got" not in found:
        found += os.read(ours, 1000)
        if found.endswith(b"100x40\r\n"):
            os.write(ours, b"\x03")  # Ctrl-C is the command's
    assert process.wait() == 5
    timer.cancel()
    assert b"got \x03" in found
    assert termios.tcgetattr(theirs)[3] == before[3]
    os.close(ours)
    os.close(theirs)


def test_attach(cli: Cli, container: str) -> None:
    async def script(process: FakeProcess) -> None:
        await process.say(b"hello\n")
        await echo(process)
        cli.cri.end(container, 6)

    cli.cri.streams.pods.script = script
    cli.cri.info = {"info": json.dumps({"stdin": True, "tty": False})}
    result = cli("attach", "web", input="typed\n")
    assert (result.stdout, result.exit_code) == ("hello\ntyped\n", 6)
    request = cli.cri.requests["Attach"]
    assert (request.stdin, request.tty, request.stderr) == (True, False, True)


def test_attach_without_stdin(cli: Cli, container: str) -> None:
    async def script(process: FakeProcess) -> None:
        await process.say(b"seen\n")
        cli.cri.end(container, 0)
        await process.exit()

    cli.cri.streams.pods.script = script
    cli.cri.info = {"info": json.dumps({"stdin": True, "tty": True})}
    result = cli("attach", "--no-stdin", "web")
    assert (result.stdout, result.exit_code) == ("seen\n", 0)
    assert not cli.cri.requests["Attach"].stdin


def test_the_keys_that_leave(cli: Cli, container: str) -> None:
    cli.cri.streams.pods.script = echo
    cli.cri.info = {"info": json.dumps({"stdin": True, "tty": True})}
    result = cli("attach", "web", input="a\x10b\x10\x11never")
    assert result.exit_code == 0
    assert "the container goes on" in result.stderr
    assert "never" not in result.stdout
    keys = DetachKeys()
    assert [keys.filter(part) for part in (b"a\x10", b"b\x10", b"\x10\x11c")] == [b"a", b"\x10b", b"\x10"]
    assert keys.pressed


@pytest.mark.parametrize("flags", [["-i"], ["-it"], ["-t"]])
def test_run_joins_before_it_starts(cli: Cli, flags: list[str]) -> None:
    cli.cri.add_image()
    calls_at_join: list[str] = []

    async def script(process: FakeProcess) -> None:
        calls_at_join.extend(cli.cri.calls)
        while "StartContainer" not in cli.cri.calls:
            await asyncio.sleep(0.01)
        await process.say(b"prompt> ")
        if process.spec.stdin:
            await process.say(b"read " + await process.read())
        await process.exit()

    cli.cri.streams.pods.script = script
    cli.cri.script.exit_code = 9
    cli.cri.script.reason = "Error"
    result = cli("run", "--rm", *flags, "busybox:1", "sh", input="typed")
    expected = "prompt> " if flags == ["-t"] else "prompt> read typed"
    assert (result.stdout, result.exit_code) == (expected, 9), result.output
    assert "StartContainer" not in calls_at_join
    config = cli.cri.requests["CreateContainer"].config
    assert (config.stdin, config.stdin_once) == ("-t" not in flags, "-t" not in flags)
    assert config.tty == ("t" in flags[0])
    assert not cli.cri.pods


def test_run_that_cannot_start_says_why(cli: Cli) -> None:
    import grpc

    cli.cri.add_image()
    cli.cri.streams.pods.script = forever
    cli.cri.failures["StartContainer"] = (grpc.StatusCode.FAILED_PRECONDITION, "no such command")
    result = cli("run", "--rm", "-i", "busybox:1", "typo")
    assert (result.exit_code, "no such command" in result.stderr) == (1, True)
    assert not cli.cri.pods


def test_port_forward(cli: Cli, container: str) -> None:
    with contextlib.ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as server:
        remote = server.getsockname()[1]
        argv = ["--config", str(cli.config), "port-forward", "web", f":{remote}", ":1"]
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "vmruntime.cli.main", *argv],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        ports = [int(process.stdout.readline().split(" ")[0].split(":")[1]) for _ in range(2)]
        with socket.create_connection(("127.0.0.1", ports[0]), timeout=20) as here:
            here.sendall(b"question")
            here.shutdown(socket.SHUT_WR)
            there, _ = server.accept()
            with there:
                assert there.makefile("rb").read() == b"question"
                there.sendall(b"answer")
            assert here.makefile("rb").read() == b"answer"
        with socket.create_connection(("127.0.0.1", ports[1]), timeout=20) as refused:
            assert refused.recv(100) == b""
        assert process.stderr is not None
        assert "error forwarding port 1 to pod" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("", 130)


@pytest.mark.parametrize("text", ["", "x", "1:", ":0", "1:2:3", "65536", "-1:2"])
def test_ports_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Forward.parse(text)


def test_ports() -> None:
    assert Forward.parse("80") == Forward(80, 80)
    assert Forward.parse("8080:80") == Forward(8080, 80)
    assert Forward.parse(":80") == Forward(0, 80)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    source = tmp_path / "here" / "s|te &"
    (source / "sub").mkdir(parents=True)
    (source / "page").write_text("text")
    (source / "sub" / "script").write_bytes(os.urandom(300_000))
    (source / "sub" / "script").chmod(0o750)
    (source / "link").symlink_to("s|te &")
    return source


def same(one: Path, other: Path) -> bool:
    return (
        (one / "sub" / "script").read_bytes() == (other / "sub" / "script").read_bytes()
        and (other / "sub" / "script").stat().st_mode & 0o777 == 0o750
        and (other / "page").read_text() == "text"
        and os.readlink(other / "link") == os.readlink(one / "link")
    )


def test_cp_into_a_container(cli: Cli, container: str, tree: Path, tmp_path: Path) -> None:
    """The "container" is this machine, so what arrives can be looked at."""
    inside = tmp_path / "inside"
    inside.mkdir()
    cli.cri.exec_answer = cri_pb2.ExecSyncResponse(exit_code=0)
    result = cli("cp", tree, f"web:{inside}")
    assert result.exit_code == 0, result.output
    assert same(tree, inside / tree.name)
    cli.cri.exec_answer = cri_pb2.ExecSyncResponse(exit_code=1)  # not a directory
    assert cli("cp", tree, f"app:{inside}/re|named&").exit_code == 0
    assert same(tree, inside / "re|named&")
    assert cli("cp", tree / "page", f"web:{inside}/file").exit_code == 0
    assert (inside / "file").read_text() == "text"


def test_cp_out_of_a_container(cli: Cli, container: str, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    result = cli("cp", f"web:{tree}", out)
    assert result.exit_code == 0, result.output
    assert same(tree, out / tree.name)
    assert cli("cp", f"web:{tree}", out / "new").exit_code == 0
    assert same(tree, out / "new")
    assert cli("cp", f"web:{tree}/page", out / "new" / "page").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(["new", tree.name]), "nothing else is left"


def test_what_cannot_be_copied(cli: Cli, container: str, tmp_path: Path) -> None:
    assert cli("cp", "a", "b").exit_code == 2
    assert cli("cp", "web:/a", "web:/b").exit_code == 2
    assert "no such file" in cli("cp", tmp_path / "none", "web:/x").stderr
    gone = cli("cp", "web:/no/such/file", tmp_path / "x")
    assert gone.exit_code == 1
    assert "tar in the container failed" in gone.stderr
    assert list(tmp_path.iterdir()) == []

    async def no_tar(process: FakeProcess) -> None:
        await process.exit(127, "not found")

    cli.cri.streams.pods.script = no_tar
    assert "the container has no tar" in cli("cp", "web:/etc", tmp_path / "x").stderr


def test_an_archive_that_is_not_what_was_asked_for(cli: Cli, container: str, tmp_path: Path) -> None:
    """Nothing a container sends lands anywhere but at the target."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "wanted").symlink_to("/etc")
    script = f"cd {evil} && tar -cPf - wanted --transform='s|^x$|../escaped|' x"
    (evil / "x").write_text("evil")

    async def send(process: FakeProcess) -> None:
        real = await asyncio.create_subprocess_shell(script, stdout=asyncio.subprocess.PIPE)
        out, _ = await real.communicate()
        await process.say(out)
        await process.exit()

    cli.cri.streams.pods.script = send
    target = tmp_path / "target"
    target.mkdir()
    cli("cp", "web:/wanted", target / "wanted")
    assert not (tmp_path / "escaped").exists()
    assert not (target / "escaped").exists()
    assert {path.name for path in target.iterdir()} <= {"wanted"}


def test_places() -> None:
    assert Place.parse("web:/a") == Place("web", "/a")
    assert Place.parse("./a:b") == Place("", "./a:b")
    assert Place.parse("a") == Place("", "a")
    with pytest.raises(InvalidArgument):
        Place.parse("web:")


def test_exit_statuses() -> None:
    assert exit_status(b'{"status": "Success"}') == 0
    with pytest.raises(Internal, match="words"):
        exit_status(b'{"status": "Failure", "reason": "InternalError", "message": "words"}')
    with pytest.raises(Unavailable):
        exit_status(b"")
    for rubbish in (b"x", b"{}", b'{"status": "Failure", "reason": "NonZeroExitCode"}'):
        with pytest.raises(Internal):
            exit_status(rubbish)
