from __future__ import annotations

import os
import signal
import threading

import grpc
import pytest

from tests.unit.cli.conftest import Cli
from tests.unit.cli.fake_cri import Script
from vmruntime.generated import cri_pb2


def test_output_exit_code_and_removal(cli: Cli) -> None:
    cli.cri.add_image()
    cli.cri.script = Script(
        lines=[("stdout", "P", b"hel"), ("stderr", "F", b"oops"), ("stdout", "F", b"lo"), ("stdout", "F", b"bye")],
        exit_code=3,
        reason="Error",
    )
    result = cli("run", "--rm", "busybox:1", "sh", "-c", "exit 3")
    assert result.stdout == "hello\nbye\n"
    assert result.stderr == "oops\n"
    assert result.exit_code == 3
    assert not cli.cri.pods
    assert "PullImage" not in cli.cri.calls
    assert list((cli.base / "root" / "logs").iterdir()) == []
    config = next(iter(cli.cri.container_configs.values()))
    assert list(config.args) == ["sh", "-c", "exit 3"]
    assert not config.command


def test_options_become_cri(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.cri.add_image()
    monkeypatch.setenv("FROM_HERE", "x y")
    result = cli(
        "run", "--name", "web", "-e", "A=b=c", "-e", "FROM_HERE", "-m", "256M", "--cpus", "0.5", "-p", "8080:80/udp",
        "-p", "[::1]:1:2", "-u", "7:8", "-w", "/srv", "-l", "k=v", "--annotation", "a=b", "--kind", "container",
        "--hostname", "host", "--entrypoint", "/bin/x", "busybox:1", "--flag",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    pod = cli.cri.requests["RunPodSandbox"].config
    container = cli.cri.requests["CreateContainer"].config
    assert (pod.metadata.name, pod.metadata.namespace, pod.hostname) == ("web", "default", "host")
    assert pod.annotations["vmruntime.io/kind"] == "container"
    assert pod.annotations["a"] == "b"
    assert dict(pod.labels) == dict(container.labels) == {"k": "v"}
    assert [(p.protocol, p.host_port, p.container_port, p.host_ip) for p in pod.port_mappings] == [
        (cri_pb2.UDP, 8080, 80, ""),
        (cri_pb2.TCP, 1, 2, "::1"),
    ]
    for resources in (pod.linux.resources, container.linux.resources):
        assert resources.memory_limit_in_bytes == 256 * 2**20
        assert (resources.cpu_period, resources.cpu_quota, resources.cpu_shares) == (100_000, 50_000, 512)
    assert [(e.key, e.value) for e in container.envs] == [("A", b"b=c"), ("FROM_HERE", b"x y")]
    security = container.linux.security_context
    assert (security.run_as_user.value, security.run_as_group.value) == (7, 8)
    assert "/proc/kcore" in security.masked_paths
    assert (container.working_dir, list(container.command), list(container.args)) == ("/srv", ["/bin/x"], ["--flag"])
    # Without --rm the pod stays, stopped, with its log.
    assert [p.state for p in cli.cri.pods.values()] == [cri_pb2.SANDBOX_NOTREADY]
    assert cli("logs", "web").exit_code == 0


def test_detach_prints_ids(cli: Cli) -> None:
    cli.cri.add_image()
    cli.cri.script = Script(forever=True)
    result = cli("run", "-d", "busybox:1")
    pod_id, container_id = result.stdout.split()
    assert result.exit_code == 0
    assert cli.cri.pods[pod_id].state == cri_pb2.SANDBOX_READY
    assert cli.cri.containers[container_id].state == cri_pb2.CONTAINER_RUNNING
    assert cli.cri.pods[pod_id].metadata.name.startswith("busybox-")


@pytest.mark.parametrize(("policy", "present", "pulls"), [
    ("missing", True, False), ("missing", False, True), ("always", True, True),
])  # fmt: skip
def test_pull_policy(cli: Cli, policy: str, present: bool, pulls: bool) -> None:
    if present:
        cli.cri.add_image()
    assert cli("run", "--rm", "--pull", policy, "busybox:1").exit_code == 0
    assert ("PullImage" in cli.cri.calls) is pulls


def test_pull_never(cli: Cli) -> None:
    result = cli("run", "--pull", "never", "busybox:1")
    assert result.exit_code == 1
    assert "not on this machine" in result.stderr
    assert "RunPodSandbox" not in cli.cri.calls


def test_image_on_disk_is_imported(cli: Cli) -> None:
    assert cli("run", "--rm", "oci:layout:web:1").exit_code == 0
    assert cli.cri.requests["PullImage"].image.image == f"oci:{os.getcwd()}/layout:web:1"
    assert cli.cri.requests["CreateContainer"].config.metadata.name == "layout"


def test_failed_start_leaves_nothing(cli: Cli) -> None:
    cli.cri.add_image()
    cli.cri.failures["CreateContainer"] = (grpc.StatusCode.RESOURCE_EXHAUSTED, "needs 64 MiB more")
    result = cli("run", "busybox:1")
    assert result.exit_code == 1
    assert result.stderr == "error: needs 64 MiB more\n"
    assert not cli.cri.pods
    assert list((cli.base / "root" / "logs").iterdir()) == []


def test_reason_of_an_unusual_end_is_shown(cli: Cli) -> None:
    cli.cri.add_image()
    cli.cri.script = Script(exit_code=137, reason="OOMKilled", message="limit \x1b[31m64 MiB")
    result = cli("run", "--rm", "busybox:1")
    assert result.exit_code == 137
    assert "OOMKilled: limit �[31m64 MiB" in result.stderr


def test_signal_stops_and_removes(cli: Cli) -> None:
    cli.cri.add_image()
    cli.cri.script = Script(lines=[("stdout", "F", b"up")], forever=True)
    before = signal.getsignal(signal.SIGTERM)
    timers: list[threading.Timer] = []

    def later() -> None:
        timers.append(threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)))
        timers[0].start()

    cli.cri.hooks["StartContainer"] = later
    result = cli("run", "--rm", "--stop-timeout", "4", "busybox:1")
    timers[0].join()
    assert result.exit_code == 143
    assert result.stdout == "up\n"
    assert "SIGTERM: stopping, at most 4 s" in result.stderr
    assert cli.cri.requests["StopContainer"].timeout == 4
    assert not cli.cri.pods
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_signal_kills(cli: Cli) -> None:
    cli.cri.add_image()
    cli.cri.script = Script(forever=True)
    stuck = threading.Event()
    timers: list[threading.Timer] = []

    def signal_later(delay: float) -> None:
        timers.append(threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)))
        timers[-1].start()

    def stop() -> None:
        if cli.cri.requests["StopContainer"].timeout:
            signal_later(0.1)
            stuck.wait(10)

    cli.cri.hooks["StartContainer"] = lambda: signal_later(0.2)
    cli.cri.hooks["StopContainer"] = stop
    cli("run", "--rm", "busybox:1")
    stuck.set()
    for timer in timers:
        timer.join()
    assert cli.cri.requests["StopContainer"].timeout == 0
    assert not cli.cri.pods


def test_signal_while_the_pod_starts(cli: Cli) -> None:
    cli.cri.add_image()
    cli.cri.hooks["RunPodSandbox"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    result = cli("run", "busybox:1")
    assert result.exit_code == 130
    assert "CreateContainer" not in cli.cri.calls
    assert not cli.cri.pods


def test_container_removed_meanwhile(cli: Cli) -> None:
    cli.cri.add_image()
    cli.cri.script = Script(forever=True)
    count = 0

    def vanish() -> None:
        nonlocal count
        count += 1
        if count == 3:
            cli.cri.failures["ContainerStatus"] = (grpc.StatusCode.NOT_FOUND, "no such container")

    cli.cri.hooks["ContainerStatus"] = vanish
    result = cli("run", "busybox:1")
    assert result.exit_code == 1
    assert "no such container" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rm", "-d", "busybox"], "exclude each other"),
        (["-m", "lots", "busybox"], "is not a size"),
        (["-p", "80", "busybox"], "is not HOST:CONTAINER"),
        (["-p", "80:99999", "busybox"], "outside 1-65535"),
        (["-p", "1:2/icmp", "busybox"], "unknown protocol"),
        (["-p", "nowhere:1:2", "busybox"], "no IP address"),
        (["-u", "a:b", "busybox"], "names its group"),
        (["-e", "=x", "busybox"], "is not KEY=VALUE"),
        (["-e", "SURELY_NOT_SET", "busybox"], "none in the environment"),
        (["--cpus", "0", "busybox"], "0"),
        ([], "Missing argument"),
    ],
)
def test_usage_errors(cli: Cli, arguments: list[str], words: str) -> None:
    result = cli("run", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not cli.cri.calls


def test_name_must_be_a_label(cli: Cli) -> None:
    result = cli("run", "--name", "../x", "busybox")
    assert result.exit_code == 1
    assert "--name: '../x' is not a DNS label" in result.stderr
