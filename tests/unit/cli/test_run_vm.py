from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Cli
from tests.unit.cli.fake_cri import Script
from tests.unit.streaming.fakes import FakeProcess
from vmruntime.cli.podspec import base_name
from vmruntime.cli.vmspec import VmOptions, vm_source
from vmruntime.cri.translate.image_pod import image_pod_from_annotations
from vmruntime.errors import InvalidArgument, NotFound

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPGSC9HtFrhKa3tj8RZcm0yJcvDqGrhFLuDLA2O3RHoq me@here"
OTHER = KEY.replace("me@here", "other")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def said(cli: Cli) -> dict[str, str]:
    given = cli.cri.requests["RunPodSandbox"].config.annotations
    return {key.removeprefix("vmruntime.io/"): value for key, value in given.items()}


def test_options_become_annotations(cli: Cli, tmp_path: Path) -> None:
    keys, data = tmp_path / "keys", tmp_path / "data"
    keys.write_text(f"# mine\n{KEY}\n")
    data.write_text("#cloud-config\npackages: [nginx]\n")
    cli.cri.script = Script(lines=[("stdout", "F", b"login:")])
    result = cli(
        "run", "--vm", "--name", "deb", "-m", "1G", "--cpus", "2", "-p", "8022:22", "-e", "A=b", "--hostname", "host",
        "--ssh-key", keys, "--user-data", data, "--root-size", "20G", "--firmware", "uefi", "--disk-driver", "virtio",
        "--vnc", "--tpm", "--annotation", "vmruntime.io/vcpus=4", "virtlet.cloud/debian",
    )  # fmt: skip
    assert (result.stdout, result.exit_code) == ("login:\n", 0), result.output
    given = said(cli)
    given.pop("created-by")
    assert given == {
        "kind": "image",
        "ssh-keys": KEY,
        "cloud-init-user-data": "#cloud-config\npackages: [nginx]\n",
        "root-volume-size": str(20 * 2**30),
        "firmware": "uefi",
        "disk-driver": "virtio",
        "vnc": "true",
        "tpm": "true",
        "vcpus": "4",
    }
    assert cli.cri.requests["PullImage"].image.image == "virtlet.cloud/debian"
    container = cli.cri.requests["CreateContainer"].config
    assert (container.stdin, container.tty, container.stdin_once) == (True, True, False)
    assert not container.linux.security_context.masked_paths
    assert [(e.key, e.value) for e in container.envs] == [("A", b"b")]
    assert container.linux.resources.memory_limit_in_bytes == 2**30


def test_nothing_is_said_that_was_not_asked_for(cli: Cli) -> None:
    assert cli("run", "--rm", "--kind", "image", "registry.example/vm:1").exit_code == 0
    assert set(said(cli)) == {"kind", "created-by"}


def test_this_users_keys_are_the_default(cli: Cli, home: Path) -> None:
    (home / ".ssh" / "id_rsa.pub").write_text(f"{OTHER}\n")
    (home / ".ssh" / "id_ed25519.pub").write_text(f"{KEY}\n")
    (home / ".ssh" / "id_ed25519-cert.pub").write_text("a certificate")
    (home / ".ssh" / "id_ed25519").write_text("secret")
    assert cli("run", "--rm", "--vm", "vm:1").exit_code == 0
    assert said(cli)["ssh-keys"] == f"{KEY}\n{OTHER}"
    assert cli("run", "--rm", "--vm", "--no-ssh-key", "vm:1").exit_code == 0
    assert "ssh-keys" not in said(cli)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("#cloud-config\na: 1\n", "cloud-init-user-data"),
        ("#cloud-config", "cloud-init-user-data"),
        ("a: 1\n", "cloud-init-user-data"),
        ("#!/bin/sh\ntrue\n", "cloud-init-user-data-script"),
        ("#include\nhttps://x.example/y\n", "cloud-init-user-data-script"),
        ("#cloud-config-archive\n- a\n", "cloud-init-user-data-script"),
        ("## template: jinja\n#cloud-config\n", "cloud-init-user-data-script"),
        ("Content-Type: multipart/mixed\n", "cloud-init-user-data-script"),
    ],
)
def test_kinds_of_user_data(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "data").write_text(text)
    made = VmOptions(ssh_keys=(), user_data=tmp_path / "data").annotations()
    assert made == {f"vmruntime.io/{name}": text}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "is no cloud-config: line"),
        (b"- a\n", "is no cloud-config"),
        (b"\xff", "is not UTF-8 text at byte 0"),
        (b"a: " + b"b" * 600_000, "at most 524288 fit"),
    ],
)
def test_bad_user_data(cli: Cli, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "data").write_bytes(content)
    result = cli("run", "--vm", "--user-data", tmp_path / "data", "vm:1")
    assert (result.exit_code, words in result.stderr) == (1, True), result.stderr
    assert not cli.cri.calls


def test_files_that_are_not_there(cli: Cli, tmp_path: Path) -> None:
    for option in ("--user-data", "--ssh-key"):
        result = cli("run", "--vm", option, tmp_path / "none", "vm:1")
        assert result.stderr == f"error: {option} {tmp_path}/none: No such file or directory\n"


def test_a_private_key_is_not_sent(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")
    result = cli("run", "--vm", "--ssh-key", tmp_path / "id", "vm:1")
    assert "begins a private key" in result.stderr
    assert "secret" not in result.stderr
    assert not cli.cri.calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vm", "vm", "sh"], "CMD means nothing with --vm"),
        (["--vm", "--entrypoint", "/x", "vm"], "--entrypoint means nothing with --vm"),
        (["--vm", "-u", "1", "vm"], "--user means nothing with --vm"),
        (["--kind", "image", "-w", "/", "vm"], "--workdir means nothing with --vm"),
        (["--vm", "--kind", "host", "vm"], "--vm and --kind host exclude each other"),
        (["--vm", "--ssh-key", "x", "--no-ssh-key", "vm"], "exclude each other"),
        (["--vnc", "busybox"], "--vnc means nothing without --vm"),
        (["--root-size", "1G", "busybox"], "--root-size means nothing without --vm"),
        (["--vm", "--root-size", "big", "vm"], "is not a size"),
        (["--vm", "--firmware", "efi", "vm"], "efi"),
    ],
)
def test_usage_errors(cli: Cli, arguments: list[str], words: str) -> None:
    result = cli("run", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not cli.cri.calls


def test_only_an_unusual_end_is_told_of(cli: Cli) -> None:
    cli.cri.script = Script(message="the guest powered off")
    assert cli("run", "--rm", "--vm", "vm:1").stderr == ""
    cli.cri.script = Script(exit_code=1, reason="Error", message="the guest's kernel panicked")
    result = cli("run", "--rm", "--vm", "vm:1")
    assert (result.exit_code, "Error: the guest's kernel panicked" in result.stderr) == (1, True)


def test_a_vm_has_more_time_to_stop(cli: Cli) -> None:
    cli.cri.script = Script(forever=True)
    cli.cri.hooks["ContainerStatus"] = _interrupt_once()
    result = cli("run", "--rm", "--vm", "vm:1")
    assert "stopping, at most 30 s" in result.stderr
    assert cli.cri.requests["StopContainer"].timeout == 30


def _interrupt_once() -> Callable[[], None]:
    sent: list[int] = []

    def hook() -> None:
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    return hook


def test_the_console_is_joined_once_the_vm_runs(cli: Cli) -> None:
    calls_at_join: list[str] = []

    async def script(process: FakeProcess) -> None:
        calls_at_join.extend(cli.cri.calls)
        await process.say(b"login: ")
        await process.say(b"hello " + await process.read())
        await process.exit()

    cli.cri.streams.pods.script = script
    result = cli("run", "--rm", "--vm", "-it", "vm:1", input="root\n")
    assert (result.stdout, result.exit_code) == ("login: hello root\n", 0), result.output
    assert "StartContainer" in calls_at_join


def test_images_by_path_and_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.qcow2").touch()
    (tmp_path / "x.raw").symlink_to("a b.qcow2")
    url = f"file://{tmp_path}/a%20b.qcow2"
    assert [vm_source(text) for text in ("./a b.qcow2", f"{tmp_path}/.ssh/../a b.qcow2", "~/a b.qcow2")] == [url] * 3
    assert vm_source("./x.raw") == f"file://{tmp_path}/x.raw"
    for same in ("virtlet.cloud/x", "registry.example/vm:1", "https://x.example/y.qcow2?z=1", url):
        assert vm_source(same) == same
    assert vm_source("oci:layout:vm:1") == f"oci:{tmp_path}/layout:vm:1"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("./none.qcow2", NotFound, "none.qcow2: No such file or directory"),
        ("/", InvalidArgument, "is not a file"),
        ("https:///x", InvalidArgument, "names no host"),
        ("file://other/x", InvalidArgument, "is not the URL of a local file"),
    ],
)
def test_images_that_are_none(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        vm_source(text)


def test_names_of_pods_of_urls() -> None:
    assert base_name("file:///srv/Debian%2012.QCOW2") == "debian-12"
    assert base_name("https://x.example:8080/images/jammy.img?token=1") == "jammy"
    assert base_name("https://x.example/") == "container"


def test_a_file_is_read_each_time(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "vm.qcow2").touch()
    for _ in range(2):
        assert cli("run", "--rm", "--vm", tmp_path / "vm.qcow2").exit_code == 0
    assert cli.cri.calls.count("PullImage") == 2
    assert cli.cri.requests["PullImage"].image.image == (tmp_path / "vm.qcow2").as_uri()
    assert cli.cri.requests["RunPodSandbox"].config.metadata.name.startswith("vm-")


def test_console_interactive(cli: Cli) -> None:
    pod = cli.cri.add_pod("vm")
    result = cli("console", "-i", "vm")
    assert (result.exit_code, "nobody listens on its console" in result.stderr) == (1, True)
    cli.cri.pod_info = {"kind": "image"}
    result = cli("console", "-i", "vm")
    assert (result.exit_code, "has no running container" in result.stderr) == (1, True)
    cli.cri.add_container(pod, "vm")

    async def script(process: FakeProcess) -> None:
        while data := await process.read():
            await process.say(data)

    cli.cri.streams.pods.script = script
    for keys in ("\x1d", "\x10\x11"):
        result = cli("console", "-i", "vm", input=f"a\x10b{keys}never")
        assert (result.exit_code, "never" in result.stdout) == (0, False)
        assert "left; the VM goes on" in result.stderr
    request = cli.cri.requests["Attach"]
    assert (request.stdin, request.tty, request.stdout, request.stderr) == (True, True, True, False)
    assert cli("console", "-i", "-f", "vm").exit_code == 2


def test_console_without_its_hole(cli: Cli) -> None:
    pod = cli.cri.add_pod("vm")
    directory = cli.base / "run" / "sandboxes" / pod[:13]
    directory.mkdir(parents=True)
    with (directory / "console.log").open("wb") as log:
        log.seek(64 * 1024)
        log.write(b"login: ")
    assert cli("console", "vm").stdout_bytes == b"login: "
    (directory / "console.log").write_bytes(b"")
    assert cli("console", "vm").stdout_bytes == b""


def test_the_daemon_understands_the_annotations() -> None:
    made = VmOptions(
        ssh_keys=(), root_size=2**30, firmware="uefi", disk_driver="virtio", vnc=True, tpm=True
    ).annotations()
    pod = image_pod_from_annotations(made)
    assert (pod.root_volume_size, pod.firmware.value, pod.disk_driver.value) == (2**30, "uefi", "virtio")
    assert (pod.vnc, pod.tpm) == (True, True)
