"""The command line against a real daemon: what people type, what they see, and the exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import leaks, registry
from tests.support.daemon import Daemon, running_daemon

pytestmark = pytest.mark.vm

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = f"oci-archive:{ROOT}/build/demo-images/busybox.tar:demo.local/busybox:1"
BUSYBOX = "demo.local/busybox:1"


@dataclasses.dataclass
class Cli:
    """The command with a daemon's configuration."""

    config: Path

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "vmruntime.cli.main", "--config", str(self.config), *arguments]

    def __call__(self, *arguments: str, status: int = 0, input: str = "") -> str:
        """Run a command to its end and return its stdout."""
        done = self.run(*arguments, input=input)
        assert done.returncode == status, done
        return done.stdout

    def run(self, *arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.argv(*arguments), input=input, capture_output=True, text=True, timeout=120)

    def fails(self, *arguments: str) -> str:
        """Run a command that vmruntime refuses: exit status 1, no output, no traceback; return what it says."""
        done = self.run(*arguments)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
        return done.stderr

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.argv(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def pods(self) -> list[dict[str, Any]]:
        return list(json.loads(self("list", "-o", "json")))


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[registry.Registry]:
    subprocess.run([ROOT / "images/demo/build.sh", "busybox"], check=True, stdin=subprocess.DEVNULL)
    with registry.registry(base / "cli-registry", auth=True) as running:
        running.copy(ARCHIVE, "team/box:2")
        yield running


@pytest.fixture(scope="module")
def node(base: Path, server: registry.Registry) -> Iterator[Daemon]:
    """A daemon with one image, on the network that hosts without a CNI configuration have."""
    conf = registry.registries_conf(base / "cli-registries.conf", {server.address: server.address})
    with running_daemon(base / "cli", f'[images]\nregistries_conf = "{conf}"', built_in_network=True) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def cli(node: Daemon) -> Cli:
    cli = Cli(node.config)
    assert cli("image", "import", "-q", ARCHIVE).startswith("sha256:")
    return cli


@pytest.fixture(autouse=True)
def clean(node: Daemon) -> Iterator[None]:
    with leaks.nothing_left(node.footprint, lambda: node.remove_all_but(frozenset())):
        yield


def test_run_shows_output_and_ends_with_the_containers_status(cli: Cli) -> None:
    script = 'echo "$GREETING from $(hostname)"; pwd; id -u; echo careful >&2; exit 7'
    done = cli.run(
        "run", "--rm", "--name", "once", "-e", "GREETING=hello", "-w", "/tmp", "-u", "1000", BUSYBOX, "sh", "-c", script
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, "hello from once\n/tmp\n1000\n")
    assert "careful\n" in done.stderr
    assert cli.pods() == []
    assert (
        cli("run", "--rm", "--memory", "256M", "--cpus", "1", BUSYBOX, "sh", "-c", "grep -c processor /proc/cpuinfo")
        == "1\n"
    )


def test_run_tells_how_it_failed(cli: Cli) -> None:
    assert "/bin/no-such" in cli.fails("run", "--rm", BUSYBOX, "/bin/no-such")
    assert "not on this machine" in cli.fails("run", "--rm", "--pull", "never", "registry.example/none:1")
    done = cli.run("run", "--rm", "-m", "32M", BUSYBOX, "dd", "if=/dev/zero", "of=/dev/null", "bs=90M", "count=1")
    assert done.returncode == 137
    assert "OOMKilled" in done.stderr
    assert cli.pods() == []


def test_interrupt_stops_and_removes(cli: Cli) -> None:
    script = "trap 'echo bye; exit 3' TERM; echo up; while true; do sleep 0.1; done"
    process = cli.start("run", "--rm", BUSYBOX, "sh", "-c", script)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert out == "bye\n"
    assert "stopping" in err
    assert process.returncode == 3
    assert cli.pods() == []


def test_trace_shows_where_the_time_went(cli: Cli) -> None:
    pod, container = cli("run", "-d", "--name", "timed", BUSYBOX, "sleep", "1000").split()
    traced = json.loads(cli("trace", "-o", "json", pod))
    run, create, start = traced["calls"]
    assert [one["name"] for one in (run, create, start)] == ["RunPodSandbox", "CreateContainer", "StartContainer"]
    assert create["container_id"] == start["container_id"] == container

    def inside(whole: dict[str, Any], name: str) -> dict[str, Any]:
        return next(one for one in whole["parts"] if one["name"] == name)

    network, boot, setup = (inside(run, f"sandbox.{name}") for name in ("network", "boot", "setup"))
    assert network["start_ms"] < boot["start_ms"] + boot["duration_ms"]
    assert boot["start_ms"] < network["start_ms"] + network["duration_ms"]
    # A start is its boot, NIC included, and the set-up; whatever else it does takes little of it.
    spent = boot["duration_ms"] + setup["duration_ms"]
    assert 0.7 * run["duration_ms"] < spent <= run["duration_ms"]
    for told in (setup, inside(create, "container.create")):
        assert len(told["parts"]) > 2
        assert all(one["name"].startswith("guest.") for one in told["parts"])
        assert 0 < max(one["duration_ms"] for one in told["parts"]) < told["duration_ms"]

    def check(part: dict[str, Any]) -> None:
        assert (part["error"], part["going_on"]) == (None, False)
        for one in part["parts"]:
            assert part["start_ms"] <= one["start_ms"] + 0.001
            assert one["start_ms"] + one["duration_ms"] <= part["start_ms"] + part["duration_ms"] + 0.001
            check(one)

    for call in (run, create, start):
        check(call)
    shown = cli("trace", "timed")
    assert re.search(r"^  sandbox\.boot +[0-9.]+ +[0-9.]+ +[▐▌█]+$", shown, re.MULTILINE)
    assert f"CreateContainer busybox ({container[:13]})" in shown
    cli("rm", "-f", "timed")
    assert "which is gone" in cli("trace", "timed")
    assert json.loads(cli("trace", "-o", "json", pod))["calls"][:3] == [run, create, start]


def test_a_pod_in_the_background(cli: Cli, node: Daemon) -> None:
    """run -d, list, logs, exec, console, inspect, stop, rm: the life of one pod by hand."""
    script = "echo first; echo second >&2; while true; do echo answer | nc -l -p 8000; done"
    pod, container = cli(
        "run", "-d", "--name", "web", "-p", "18099:8000", "-l", "tier=front", BUSYBOX, "sh", "-c", script
    ).split()  # fmt: skip
    (shown,) = cli.pods()
    assert (shown["id"], shown["name"], shown["state"]) == (pod, "web", "ready")
    assert shown["labels"]["tier"] == "front"
    (inner,) = shown["containers"]
    assert (inner["id"], inner["state"], inner["image"], inner["exit_code"]) == (container, "running", BUSYBOX, None)
    assert cli("list", "-q") == f"{pod}\n"
    table = cli("list")
    assert re.search(rf"{pod[:13]} +web +\S+ +container +ready +{re.escape(shown['ips'][0])}", table)
    assert re.search(rf"{container[:13]} +\S+ +running", table)
    assert answer(shown["ips"][0], 8000) == "answer\n"
    assert answer(host_address(), 18099) == "answer\n"

    until_logged(cli, "web", "second")
    assert cli("logs", "web") == "first\n"
    assert "second\n" in cli.run("logs", "web").stderr
    done = cli.run("exec", "web", "--", "sh", "-c", "uname -n; echo oops >&2; exit 5")
    assert (done.returncode, done.stdout, done.stderr) == (5, "web\n", "oops\n")
    assert "no-such" in cli.run("exec", "web", "no-such").stderr
    assert "vmruntime-agent: " in cli(
        "console", "web"
    )  # ready, or connected where the guest was not booted for this pod
    assert json.loads(cli("inspect", "web"))

    assert "is running" in cli.fails("rm", "web")
    assert "no pod" in cli.fails("stop", "wab").lower()
    assert cli("stop", "-t", "0", "web") == f"{pod}\n"
    (shown,) = cli.pods()
    assert (shown["state"], shown["containers"][0]["exit_code"]) == ("stopped", 137)
    assert cli("list", "-q", "--running") == ""
    assert cli("logs", "web") == "first\n"  # they stay until the pod is removed
    assert "has no running container" in cli.fails("exec", "web", "true")
    assert cli("rm", "web") == f"{pod}\n"
    assert cli.pods() == []
    assert not list((node.root / "logs").iterdir())


def test_logs_follow(cli: Cli) -> None:
    script = "for i in 1 2 3 4 5; do echo line $i; sleep 0.3; done"
    cli("run", "-d", "--name", "talk", BUSYBOX, "sh", "-c", script)
    assert cli("logs", "-f", "talk").splitlines() == [f"line {n}" for n in range(1, 6)]
    assert cli("logs", "--tail", "2", "talk") == "line 4\nline 5\n"
    assert cli("rm", "--force", "talk")


def answer(address: str, port: int) -> str:
    """Return what a server says, trying for 20 s while it starts."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5) as connection:
            if said := connection.makefile().read():
                return said
        assert time.monotonic() < deadline, f"{address}:{port} does not answer"
        time.sleep(0.1)


def host_address() -> str:
    """An address of this machine other than loopback's."""
    shown = subprocess.run(["ip", "-j", "-4", "addr"], stdout=subprocess.PIPE, check=True).stdout
    addresses = [one["local"] for link in json.loads(shown) for one in link["addr_info"] if one["scope"] == "global"]
    return str(addresses[0])


def until_logged(cli: Cli, pod: str, text: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        done = cli.run("logs", pod)
        if text in done.stdout + done.stderr:
            return
        assert time.monotonic() < deadline, done


def test_images(cli: Cli, node: Daemon, server: registry.Registry) -> None:
    name = f"{server.address}/team/box:2"
    assert "pull secret" in cli.fails("image", "pull", name)
    login = ("--username", registry.USER)
    assert "pull secret" in cli.run("image", "pull", *login, name, input="wrong\n").stderr
    done = cli.run("image", "pull", *login, name, input=f"{registry.PASSWORD}\n")
    assert done.returncode == 0, done
    image = done.stdout.strip()
    assert "here after" in done.stderr
    listed = {one["id"]: one for one in json.loads(cli("image", "list", "-o", "json"))}
    assert sorted(listed[image]["repo_tags"]) == sorted([BUSYBOX, name])  # the archive's very image
    assert re.search(rf"{server.address}/team/box +2 +" + image.removeprefix("sha256:")[:12], cli("image", "list"))
    assert cli("image", "list", "-q").split() == [image]
    assert "image 'none'" in cli.fails("image", "rm", "none", name)
    assert cli("image", "rm", name) == f"{image}\n"
    assert cli("image", "list", "-q") == ""
    assert list((node.root / "layers").iterdir()) == []
    tar = ROOT / "build/demo-images/busybox.tar"
    assert cli("image", "import", str(tar)).strip() == image
    assert cli("run", "--rm", image.removeprefix("sha256:")[:12], "echo", "by id") == "by id\n"
    cli("run", "-d", "--name", "user", image, "sleep", "1000")
    try:
        assert re.search(r" in use *$", cli("image", "list"), re.MULTILINE)
        assert cli("image", "prune", "--older-than", "0", "-q") == ""
    finally:
        cli("rm", "-f", "user")
    used = json.loads(cli("image", "list", "-o", "json"))[0]
    assert used["in_use"] is False
    assert abs(time.time() - datetime.datetime.fromisoformat(used["last_used_at"]).timestamp()) < 60
    assert re.search(r" ago *$", cli("image", "list"), re.MULTILINE)
    assert cli("image", "prune", "--older-than", "1h", "-q") == ""
    assert cli("image", "prune", "--older-than", "0", "-q") == f"{image}\n"
    assert list((node.root / "layers").iterdir()) == []
    assert cli("image", "import", str(tar)).strip() == image
    assert "no such file" in cli.fails("image", "import", "/no/such.tar")


def test_doctor_finds_what_this_machine_has(cli: Cli, tmp_path: Path) -> None:
    found = {one["name"]: one for one in json.loads(cli("doctor", "-o", "json"))}
    assert {one["state"] for one in found.values()} <= {"found", "degraded"}
    assert "QEMU" in found["qemu"]["why"]
    text = cli("doctor")
    assert "Pods can run here" in text
    broken = tmp_path / "broken.toml"
    broken.write_text('[hypervisor]\nqemu = "/no/qemu"\n')
    done = Cli(broken).run("doctor")
    assert done.returncode == 1
    assert "Pods cannot run here: " in done.stdout
    assert "/no/qemu" in done.stdout


def test_version_and_a_daemon_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    assert cli("version").count("0.") >= 2
    absent = tmp_path / "absent.toml"
    absent.write_text(f'root = "{tmp_path}/root"\nrun = "/tmp/vmr-none"\n')
    said = Cli(absent).fails("list")
    assert "/tmp/vmr-none/vmruntime.sock" in said
    assert "vmruntime serve" in said
    typo = tmp_path / "typo.toml"
    typo.write_text('roots = "/x"\n')
    assert "did you mean root?" in Cli(typo).fails("list")


def test_serve(base: Path) -> None:
    daemon = Daemon(base / "served")
    cli = Cli(daemon.config)
    assert cli("serve", "--check") == "the configuration can be used\n"
    process = cli.start("serve")
    try:
        deadline = time.monotonic() + 30
        while cli.run("list").returncode != 0:
            assert time.monotonic() < deadline
        assert cli.pods() == []
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "ready" in err
    daemon.end()
