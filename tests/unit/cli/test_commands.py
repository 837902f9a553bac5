from __future__ import annotations

import json
import stat
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import click
import grpc
import pytest

import vmruntime.cli.follow
from tests.unit.cli.conftest import Cli
from vmruntime.cli.main import main
from vmruntime.generated import cri_pb2, maintenance_pb2

LINE = b"2026-01-02T03:04:05.000000006Z stdout F "


def test_every_command_and_option_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
    for name, command in main.commands.items():
        for path, leaf in _leaves(name, command):
            assert f"`{path}" in text, path
            for option in leaf.params:
                if isinstance(option, click.Option) and option.expose_value and path == "run":
                    assert f"`{option.opts[-1]}" in text, (path, option.opts)


def _leaves(path: str, command: click.Command) -> list[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        return [leaf for name, child in command.commands.items() for leaf in _leaves(f"{path} {name}", child)]
    return [(path, command)]


def test_every_command_has_help(offline: Cli) -> None:
    top = offline("--help")
    names = [line.split()[0] for line in top.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert set(names) >= {"run", "list", "image", "exec", "logs", "stop", "rm", "console", "doctor", "guest", "serve"}
    for name in names:
        result = offline(name, "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage:")


@pytest.mark.parametrize("command", [["list"], ["run", "x"], ["exec", "x", "y"], ["image", "list"], ["stop", "x"]])
def test_without_a_daemon(offline: Cli, command: list[str]) -> None:
    result = offline(*command)
    assert result.exit_code == 1
    socket = offline.base / "run" / "vmruntime.sock"
    assert result.stderr == (
        f"error: no vmruntime daemon: {socket} does not exist\n  start the daemon: vmruntime serve\n"
    )


def test_debug_shows_the_traceback(offline: Cli) -> None:
    result = offline("--debug", "list")
    assert "Traceback" in result.stderr
    assert "error: no vmruntime daemon" in result.stderr


def test_address_option_and_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = cli.base / "other.sock"
    elsewhere.symlink_to(cli.base / "run" / "vmruntime.sock")
    (cli.base / "config.toml").write_text('socket = "/nonexistent"\n')
    assert cli("list").exit_code == 1
    assert cli("--address", elsewhere, "list").exit_code == 0
    assert cli("--address", f"unix://{elsewhere}", "list").exit_code == 0
    monkeypatch.setenv("VMRUNTIME_ADDRESS", str(elsewhere))
    assert cli("list").exit_code == 0


def test_bad_configuration_is_one_line(offline: Cli) -> None:
    offline.config.write_text("socet = 1\n")
    result = offline("list")
    assert result.exit_code == 1
    assert result.stderr == (f"error: {offline.config}: socet: 1 is not a known key\n  did you mean socket?\n")


@pytest.mark.parametrize(
    "code",
    [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK,)],
)
def test_every_status_is_one_line(cli: Cli, code: grpc.StatusCode) -> None:
    cli.cri.failures["ListContainers"] = (code, "so it is")
    result = cli("list")
    assert (result.exit_code, result.stderr) == (1, "error: so it is\n")


def test_list(cli: Cli) -> None:
    old = cli.cri.add_pod("old", pod_id="a" * 64, ready=False)
    new = cli.cri.add_pod("new", pod_id="b" * 64, created=2)
    cli.cri.add_container(old, "job", exit_code=3)
    cli.cri.add_container(new, "web")
    lines = cli("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "POD", "b" * 13, lines[2].split()[0], "a" * 13, lines[4].split()[0],
    ]  # fmt: skip
    assert lines[1].split()[1:6] == ["new", "default", "container", "ready", "10.88.0.2"]
    assert lines[2].startswith("  ")
    assert "web" in lines[2]
    assert "running" in lines[2]
    assert "exited (3)" in lines[4]
    assert cli("list", "-q").stdout.split() == [new, old]
    assert cli("list", "--running", "-q").stdout.split() == [new]
    shown = json.loads(cli("list", "-o", "json").stdout)
    assert [pod["name"] for pod in shown] == ["new", "old"]
    assert shown[1]["containers"][0]["exit_code"] == 3
    assert shown[1]["kind"] == "container"
    cli.cri.failures["ListPodKinds"] = (grpc.StatusCode.UNIMPLEMENTED, "another runtime")
    assert cli("list").stdout.splitlines()[1].split()[1:5] == ["new", "default", "-", "ready"]
    assert shown[0]["created_at"] == "1970-01-01T00:00:00.000000002Z"
    assert "�" in _row(cli, "evil\x1b[2J")


def _row(cli: Cli, name: str) -> str:
    cli.cri.add_pod(name)
    text = cli("list").stdout
    assert "\x1b" not in text
    return text


def test_exec_passes_everything_through(cli: Cli) -> None:
    container = cli.cri.add_container(cli.cri.add_pod("web"), "app")
    script = "printf 'out\\377'; printf err >&2; exit 42"
    result = cli("exec", "--timeout", "9", "web", "--", "sh", "-c", script)
    assert (result.exit_code, result.stdout_bytes, result.stderr) == (42, b"out\xff", "err")
    request = cli.cri.requests["Exec"]
    assert (request.container_id, list(request.cmd)) == (container, ["sh", "-c", script])
    assert (request.stdin, request.tty, request.stderr) == (False, False, True)
    assert cli("exec", container[:6], "true").exit_code == 0
    assert cli("exec", "web").exit_code == 2
    assert cli("exec", "web", "--").exit_code == 2


def test_lookup(cli: Cli) -> None:
    first = cli.cri.add_pod("first", pod_id="ab" + "0" * 62)
    cli.cri.add_pod("second", pod_id="ac" + "0" * 62)
    one = cli.cri.add_container(first, "one")
    cli.cri.add_container(first, "two")
    ambiguous = cli("stop", "a")
    assert ambiguous.exit_code == 1
    assert "first (ab00000000000)" in ambiguous.stderr
    assert "second (ac00000000000)" in ambiguous.stderr
    assert cli("stop", "nobody").exit_code == 1
    assert "StopPodSandbox" not in cli.cri.calls
    several = cli("exec", "first", "true")
    assert several.exit_code == 1
    assert "--container NAME" in several.stderr
    assert cli("exec", "-c", "one", "first", "true").exit_code == 0
    assert cli.cri.requests["Exec"].container_id == one
    assert "no container named 'three'" in cli("exec", "-c", "three", "first", "true").stderr
    cli.cri.end(one, 0)
    assert "is not running" in cli("exec", "one", "true").stderr
    assert cli("exec", "first", "true").exit_code == 0
    assert "no running container" in cli("exec", "second", "true").stderr


def test_logs(cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(LINE + b"one\n" + LINE.replace(b" F ", b" P ") + b"tw\nrubbish\n" + LINE + b"o\n")
    cli.cri.add_container(cli.cri.add_pod("web"), "app", exit_code=0, log=log)
    result = cli("logs", "web")
    assert result.stdout == "one\ntwo\n"
    assert "left out 1 lines" in result.stderr
    assert cli("logs", "--tail", "1", "web").stdout == "two\n"
    assert cli("logs", "--tail", "0", "web").stdout == ""
    assert cli("logs", "-t", "--tail", "1", "app").stdout == "2026-01-02T03:04:05.000000006Z two\n"
    log.unlink()
    assert "is gone" in cli("logs", "web").stderr


def test_logs_follow_through_a_rotation_and_a_restart(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_bytes(LINE + b"one\n")
    container = cli.cri.add_container(cli.cri.add_pod("web"), "app", log=log)
    asked = threading.Event()

    def work() -> None:
        asked.wait(5)
        cli.cri.failures["ContainerStatus"] = (grpc.StatusCode.UNAVAILABLE, "restarting")
        log.rename(tmp_path / "log.1")
        with (tmp_path / "log.1").open("ab") as old:
            old.write(LINE + b"two\n")
        log.write_bytes(LINE + b"three\n")
        threading.Event().wait(0.3)
        del cli.cri.failures["ContainerStatus"]
        cli.cri.end(container, 0)

    count = 0

    def hook() -> None:
        nonlocal count
        count += 1
        if count == 2:
            asked.set()

    cli.cri.hooks["ContainerStatus"] = hook
    thread = threading.Thread(target=work)
    thread.start()
    result = cli("logs", "-f", "web")
    thread.join()
    assert result.exit_code == 0, result.output
    assert result.stdout == "one\ntwo\nthree\n"
    cli.cri.failures["ContainerStatus"] = (grpc.StatusCode.UNAVAILABLE, "gone for good")
    monkeypatch.setattr(vmruntime.cli.follow, "RESTART_PATIENCE", 0.2)
    assert "gone for good" in cli("logs", "-f", "web").stderr


def test_stop_and_rm(cli: Cli) -> None:
    pod = cli.cri.add_pod("web")
    container = cli.cri.add_container(pod, "app")
    refused = cli("rm", "web")
    assert refused.exit_code == 1
    assert "is running" in refused.stderr
    assert cli("stop", "-t", "3", "web").stdout == f"{pod}\n"
    assert cli.cri.requests["StopContainer"].timeout == 3
    assert cli.cri.pods[pod].state == cri_pb2.SANDBOX_NOTREADY
    assert cli("rm", container).exit_code == 0
    assert cli("rm", "web").stdout == f"{pod}\n"
    assert not cli.cri.pods
    running = cli.cri.add_pod("other")
    assert cli("rm", "-f", "other").stdout == f"{running}\n"


def test_rm_removes_only_our_logs(cli: Cli) -> None:
    logs = cli.base / "root" / "logs"
    for name in ("ours", "theirs"):
        pod = cli.cri.add_pod(name, ready=False)
        (logs / f"default_{name}_uid-{name}").mkdir(parents=True)
        if name == "ours":
            cli.cri.pods[pod].annotations["vmruntime.io/created-by"] = "vmruntime-run"
    assert cli("rm", "ours", "theirs").exit_code == 0
    assert [path.name for path in logs.iterdir()] == ["default_theirs_uid-theirs"]


def test_inspect(cli: Cli) -> None:
    image = cli.cri.add_image()
    container = cli.cri.add_container(cli.cri.add_pod("web"), "app", exit_code=1)
    shown = json.loads(cli("inspect", "web", "app", image.id[7:15]).stdout)
    assert [item["type"] for item in shown] == ["pod", "container", "image"]
    pod = shown[0]
    assert pod["status"]["state"] == "SANDBOX_READY"
    assert pod["status"]["metadata"]["attempt"] == 0
    assert pod["info"] == {"info": {"pid": 7}, "text": "not json"}
    assert pod["containers"][0]["status"]["id"] == container
    assert shown[1]["status"]["finished_at"] is None
    assert cli("inspect", "nobody").exit_code == 1


def test_console(cli: Cli) -> None:
    pod = cli.cri.add_pod("web")
    assert "has no console" in cli("console", "web").stderr
    directory = cli.base / "run" / "sandboxes" / pod[:13]
    directory.mkdir(parents=True)
    (directory / "console.log").write_bytes(b"Linux version\r\n")
    assert cli("console", "web").stdout_bytes == b"Linux version\r\n"
    calls = 0

    def hook() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            with (directory / "console.log").open("ab") as log:
                log.write(b"bye\n")
            cli.cri.pods[pod].state = cri_pb2.SANDBOX_NOTREADY

    cli.cri.hooks["PodSandboxStatus"] = hook
    assert cli("console", "-f", "web").stdout_bytes == b"Linux version\r\nbye\n"


def test_image_list_and_rm(cli: Cli) -> None:
    image = cli.cri.add_image("registry.example:5000/app:2")
    lines = cli("image", "list").stdout.splitlines()
    assert lines[1].split() == ["registry.example:5000/app", "2", "a" * 13, "5.0", "MiB", "-"]
    assert json.loads(cli("image", "list", "-o", "json").stdout)[0]["size"] == 5 * 2**20
    assert cli("image", "list", "-q").stdout == f"{image.id}\n"
    assert cli("image", "rm", "nothing").exit_code == 1
    cli.cri.add_image("other:1", "ab"[1])
    assert cli("image", "rm", "aaaa").stdout == f"{image.id}\n"
    assert image.id not in cli.cri.images


def test_image_list_shows_disks_of_vms(cli: Cli) -> None:
    cli.cri.add_image("plain:1", "a")
    assert "DISK" not in cli("image", "list").stdout
    vm = cli.cri.add_image("virtlet.cloud/debian:latest", "b")
    annotations = {"vmruntime.io/disk-format": "qcow2", "vmruntime.io/disk-size": str(10 * 2**30)}
    vm.spec.CopyFrom(cri_pb2.ImageSpec(image=vm.id, annotations=annotations))
    cli.cri.images[vm.id] = vm
    head, plain, shown = cli("image", "list").stdout.splitlines()
    assert "DISK" in head
    assert " - " in plain
    assert "qcow2, 10.0 GiB" in shown


def test_image_convert(cli: Cli, tmp_path: Path) -> None:
    source, target = tmp_path / "source.img", tmp_path / "target.qcow2"
    source.write_bytes(bytes(510) + b"\x55\xaa" + bytes(2**20 - 512))
    assert cli("image", "convert", source, target).exit_code == 0
    assert target.read_bytes()[:4] == b"QFI\xfb"
    again = cli("image", "convert", "--format", "raw", target, target)
    assert (again.exit_code, "is there already" in again.stderr) == (1, True)
    source.write_bytes(b"<html>")
    assert "is a web page" in cli("image", "convert", source, tmp_path / "x").stderr


def test_image_list_tells_the_last_use(cli: Cli) -> None:
    names = ("new:1", "used:1", "pinned:1", "untold:1")
    new, used, pinned, untold = (cli.cri.add_image(name, letter) for name, letter in zip(names, "abcd", strict=True))
    pinned.pinned = True
    cli.cri.images[pinned.id] = pinned
    then = time.time_ns() - 3 * 24 * 3600 * 10**9
    for image in (new, used, pinned):
        use = maintenance_pb2.ImageUse(id=image.id, last_used_at=then, in_use=image is used)
        cli.cri.uses[image.id] = use
    lines = cli("image", "list").stdout.splitlines()
    ends = {line.split()[0]: line.split("MiB")[1].strip() for line in lines[1:]}
    assert ends == {"new": "3 days ago", "used": "in use", "pinned": "3 days ago, pinned", "untold": "-"}
    shown = {one["id"]: one for one in json.loads(cli("image", "list", "-o", "json").stdout)}
    assert shown[used.id]["in_use"] is True
    assert shown[used.id]["last_used_at"].startswith("20")
    assert shown[untold.id]["in_use"] is None
    cli.cri.failures["ListImageUse"] = (grpc.StatusCode.UNIMPLEMENTED, "not here")
    assert cli("image", "list").stdout.splitlines()[1].split()[-1] == "-"


def test_image_prune(cli: Cli) -> None:
    old, used = cli.cri.add_image("old:1", "a"), cli.cri.add_image("used:1", "b")
    for image in (old, used):
        cli.cri.uses[image.id] = maintenance_pb2.ImageUse(id=image.id, last_used_at=1, in_use=image is used)
    result = cli("image", "prune", "--older-than", "1w2d", "--dry-run")
    assert cli.cri.requests["PruneImages"] == maintenance_pb2.PruneImagesRequest(
        unused_seconds=9 * 24 * 3600, dry_run=True
    )
    assert result.stdout.splitlines()[1].split()[:2] == ["old", "1"]
    assert result.stderr == "1 image would be removed, 1.0 MiB\n"
    assert cli("image", "prune", "--older-than", "30m", "-q").stdout == f"{old.id}\n"
    assert not cli.cri.requests["PruneImages"].dry_run
    cli.cri.uses.clear()
    assert cli("image", "prune", "--older-than", "0").stderr == "0 images removed, 0 B\n"
    assert cli("image", "prune").exit_code == 2
    for wrong in ("soon", "7y", "-1d", "1d 2h", "d"):
        result = cli("image", "prune", "--older-than", wrong)
        assert (result.exit_code, "is not a duration" in result.stderr) == (2, True), result.output


def test_image_pull_reads_the_password_from_stdin(cli: Cli) -> None:
    result = cli("image", "pull", "-u", "me", "registry.example/app:1", input="se:cret\n")
    assert result.stdout == f"sha256:{'f' * 64}\n"
    request = cli.cri.requests["PullImage"]
    assert (request.image.image, request.auth.username, request.auth.password) == (
        "registry.example/app:1", "me", "se:cret",
    )  # fmt: skip
    assert not _auth_given(cli, "image", "pull", "-q", "app:1")


def _auth_given(cli: Cli, *arguments: str) -> bool:
    assert cli(*arguments).exit_code == 0
    return bool(cli.cri.requests["PullImage"].HasField("auth"))


def test_image_import_recognises_what_it_is(cli: Cli, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    layout.mkdir()
    assert "no oci-layout file" in cli("image", "import", layout).stderr
    (layout / "oci-layout").write_text("{}")
    _write_index(layout, "reg.example/app:1")
    (layout / "manifest.json").write_text('[{"RepoTags": ["app:2"]}]')
    for file, members, expected in (
        ("o.tar", ["oci-layout", "index.json"], "oci-archive:{}:reg.example/app:1"),
        ("d.tar", ["manifest.json"], "docker-archive:{}:app:2"),
    ):
        with tarfile.open(tmp_path / file, "w") as archive:
            for member in members:
                archive.add(layout / member, f"./{member}")
        assert _imported(cli, tmp_path / file) == expected.format(tmp_path / file)
    assert _imported(cli, layout) == f"oci:{layout}:reg.example/app:1"
    assert _imported(cli, f"oci:{layout}:other:3") == f"oci:{layout}:other:3"
    (tmp_path / "text").write_text("hello")
    assert "not a tar archive" in cli("image", "import", tmp_path / "text").stderr
    assert "no such file" in cli("image", "import", tmp_path / "nowhere").stderr


@pytest.mark.parametrize(
    ("name", "head"), [("a.qcow2", b"QFI\xfb"), ("b", b"QFI\xfb"), ("c", b"KDMV"), ("d.raw", b""), ("e.img", b"\0")]
)
def test_image_import_takes_disks(cli: Cli, tmp_path: Path, name: str, head: bytes) -> None:
    (tmp_path / name).write_bytes(head)
    assert _imported(cli, tmp_path / name) == f"file://{tmp_path}/{name}"


def test_image_import_needs_one_name(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "oci-layout").write_text("{}")
    _write_index(tmp_path, "a:1", "b:1")
    assert "holds several images: a:1, b:1" in cli("image", "import", tmp_path).stderr
    _write_index(tmp_path)
    assert "without a name" in cli("image", "import", tmp_path).stderr
    (tmp_path / "index.json").write_text('{"manifests": [3]}')
    assert "malformed" in cli("image", "import", tmp_path).stderr
    (tmp_path / "index.json").unlink()
    assert "cannot be read" in cli("image", "import", tmp_path).stderr
    assert "PullImage" not in cli.cri.calls


def _write_index(layout: Path, *names: str) -> None:
    manifests = [{"annotations": {"org.opencontainers.image.ref.name": name}} for name in names]
    (layout / "index.json").write_text(json.dumps({"manifests": manifests or [{}]}))


def _imported(cli: Cli, source: str | Path) -> str:
    result = cli("image", "import", source)
    assert result.exit_code == 0, result.output
    return str(cli.cri.requests["PullImage"].image.image)


def test_version(cli: Cli) -> None:
    assert "daemon  fake 9.9, CRI v1" in cli("version").stdout
    assert json.loads(cli("version", "-o", "json").stdout)["daemon"]["runtime_name"] == "fake"


def test_version_without_a_daemon(offline: Cli) -> None:
    result = offline("version")
    assert result.exit_code == 0
    assert "no vmruntime daemon" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(offline: Cli, shell: str) -> None:
    result = offline("completion", shell)
    assert result.exit_code == 0
    assert "_VMRUNTIME_COMPLETE" in result.stdout


def test_guest_build_and_info(offline: Cli, tmp_path: Path) -> None:
    assert "there is no guest" in offline("guest", "info").stderr
    assert "is not vmruntime's source tree" in offline("guest", "build", "--source", tmp_path).stderr
    (tmp_path / "guest-agent").mkdir()
    (tmp_path / "guest-agent" / "Cargo.toml").touch()
    (tmp_path / "Makefile").write_text("guest:\n\t@touch made\n")
    install = tmp_path / "images" / "initramfs" / "install.sh"
    install.parent.mkdir(parents=True)
    install.write_text('#!/bin/sh\nmkdir -p "$1" && echo \'{"schema": 1}\' >"$1/guest.json"\n')
    install.chmod(install.stat().st_mode | stat.S_IXUSR)
    result = offline("guest", "build", "--source", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made").exists()
    assert offline("guest", "info").stdout == '{"schema": 1}\n'
    (tmp_path / "Makefile").write_text("guest:\n\t@exit 5\n")
    assert "failed with status 2" in offline("guest", "build", "--source", tmp_path).stderr


def test_serve_check(offline: Cli) -> None:
    assert offline("serve", "--check").exit_code == 0
    offline.config.write_text('[log]\nlevel = "loud"\n')
    assert offline("serve", "--check").exit_code == 1


def test_runs_as_a_module(offline: Cli) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmruntime.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("vmruntime ")
