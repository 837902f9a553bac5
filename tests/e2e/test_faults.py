"""Requests that must fail: each with its code, a message that says what to do, and nothing left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support import leaks, registry
from tests.support.daemon import Daemon, container_config, running_daemon, sandbox_config
from tests.support.pods import create, run_pod, sh, start, status, wait_exit
from tests.support.refusal import refused
from tests.support.registry import Registry, build_image, files
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Registry]:
    with registry.registry(base / "faults-registry") as running:
        yield running


@pytest.fixture(scope="module")
def node(base: Path, server: Registry) -> Iterator[Daemon]:
    """A daemon that knows one registry that works and one that does not."""
    locations = {"registry.example": server.address, "dead.example": "127.0.0.1:1"}
    conf = registry.registries_conf(base / "faults-registries.conf", locations)
    with running_daemon(base / "faults", f'[images]\nregistries_conf = "{conf}"') as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def clean(node: Daemon) -> Iterator[None]:
    pods, containers = node.pods(), node.containers()
    with leaks.nothing_left(node.footprint, lambda: node.remove_all_but(pods, containers), kept=pods):
        yield


@pytest.fixture(scope="module")
def image(node: Daemon, busybox: str) -> str:
    return pull(node, busybox)


@pytest.fixture(scope="module")
def pod(node: Daemon) -> Iterator[str]:
    """A pod for every test here that leaves it as it was."""
    yield (name := run_pod(node, "faults"))
    node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


def pull(daemon: Daemon, name: str) -> str:
    request = cri.PullImageRequest(image=cri.ImageSpec(image=name))
    return str(daemon.images.PullImage(request, timeout=60).image_ref)


# --- images


def test_an_image_nobody_has(node: Daemon, server: Registry) -> None:
    with refused(Code.NOT_FOUND, "registry.example/none:1"):
        pull(node, "registry.example/none:1")
    with refused(Code.INVALID_ARGUMENT, "image reference", "'Not A Name'"):
        pull(node, "Not A Name")
    for name in ("registry.example/none:1", "Not A Name", "sha256:" + "0" * 64):
        spec = cri.ImageSpec(image=name)
        assert not node.images.ImageStatus(cri.ImageStatusRequest(image=spec)).HasField("image")
        node.images.RemoveImage(cri.RemoveImageRequest(image=spec))


def test_a_registry_out_of_reach(node: Daemon) -> None:
    with refused(Code.UNKNOWN, "RegistryUnavailable", "dead.example/app:1", "refused", "check the registry's address"):
        pull(node, "dead.example/app:1")


def test_a_layer_that_was_changed(node: Daemon, server: Registry, tmp_path: Path) -> None:
    built = files({"content": b"a" * 1000})
    server.push(build_image(tmp_path / "l", [built]), "bent:1")
    blob = server.blob_file(built.digest)
    good = blob.read_bytes()
    blob.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with refused(Code.FAILED_PRECONDITION, "registry.example/bent:1", "the image is corrupt", "push the image again"):
        pull(node, "registry.example/bent:1")
    listed = node.images.ListImages(cri.ListImagesRequest()).images
    assert "registry.example/bent:1" not in [tag for one in listed for tag in one.repo_tags]
    blob.write_bytes(good)
    pulled = pull(node, "registry.example/bent:1")
    node.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=pulled)))


def test_an_image_of_another_machine(node: Daemon, server: Registry, tmp_path: Path) -> None:
    server.push(build_image(tmp_path / "l", [files({"a": b"a"})], architecture="s390x"), "other:1")
    with refused(Code.FAILED_PRECONDITION, "registry.example/other:1", "s390x"):
        pull(node, "registry.example/other:1")


def test_an_archive_that_is_none(node: Daemon, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar")
    with refused(Code.NOT_FOUND, "absent.tar"):
        pull(node, f"oci-archive:{tmp_path}/absent.tar:app:1")
    with pytest.raises(grpc.RpcError) as failed:
        pull(node, f"oci-archive:{tmp_path}/x.tar:app:1")
    assert f"{tmp_path}/x.tar" in str(failed.value.details())
    assert "internal error" not in str(failed.value.details())


# --- pods


SandboxFault = tuple[dict[str, Any], str, Code, tuple[str, ...]]
SANDBOX_FAULTS: dict[str, SandboxFault] = {
    "kind": ({"annotations": {"vmruntime.io/kind": "jail"}}, "", Code.INVALID_ARGUMENT, ("vmruntime.io/kind", "'jail'", "container")),
    "handler": ({}, "gvisor", Code.INVALID_ARGUMENT, ("runtime_handler", "'gvisor'", "RuntimeClass")),
    "hostname": ({"hostname": "a b"}, "", Code.INVALID_ARGUMENT, ("config.hostname", "'a b'")),
    "dns": ({"dns_config": cri.DNSConfig(servers=["dns.example"])}, "", Code.INVALID_ARGUMENT, ("dns_config.servers[0]", "dns.example")),
    "port": (
        {"port_mappings": [cri.PortMapping(host_port=70000, container_port=80)]},
        "",
        Code.INVALID_ARGUMENT,
        ("port_mappings[0].host_port", "70000", "65535"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(SANDBOX_FAULTS))
def test_a_pod_that_cannot_be(node: Daemon, case: str) -> None:
    fields, handler, code, words = SANDBOX_FAULTS[case]
    request = cri.RunPodSandboxRequest(config=sandbox_config("odd", node.base, **fields), runtime_handler=handler)
    with refused(code, *words):
        node.runtime.RunPodSandbox(request)
    assert "odd" not in {one.metadata.name for one in node.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items}


def test_a_sysctl_the_kernel_does_not_have(node: Daemon) -> None:
    config = sandbox_config("odd", node.base)
    config.linux.sysctls["net.core.no_such_thing"] = "1"
    with refused(Code.INVALID_ARGUMENT, "net.core.no_such_thing"):
        node.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config))


def test_a_pod_larger_than_the_host(node: Daemon) -> None:
    config = sandbox_config("odd", node.base)
    config.linux.resources.memory_limit_in_bytes = 1 << 50
    with refused(Code.INVALID_ARGUMENT, "memory_limit_in_bytes", "this host's", "ask for at most"):
        node.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config))


def test_names_that_are_taken(node: Daemon, pod: str, image: str) -> None:
    with refused(Code.ALREADY_EXISTS, "faults", pod, "another attempt number"):
        run_pod(node, "faults")
    one = create(node, pod, image, "twin", "true")
    with refused(Code.ALREADY_EXISTS, "twin", one, "another attempt number"):
        create(node, pod, image, "twin", "true")


# --- ids


BY_CONTAINER: dict[str, Callable[[Any], Any]] = {
    "ContainerStatus": lambda i: cri.ContainerStatusRequest(container_id=i),
    "StartContainer": lambda i: cri.StartContainerRequest(container_id=i),
    "ExecSync": lambda i: cri.ExecSyncRequest(container_id=i, cmd=["true"]),
    "ContainerStats": lambda i: cri.ContainerStatsRequest(container_id=i),
    "ReopenContainerLog": lambda i: cri.ReopenContainerLogRequest(container_id=i),
}


@pytest.mark.parametrize("method", sorted(BY_CONTAINER))
@pytest.mark.parametrize("unknown", ["no-such-id", "f" * 64])
def test_a_container_nobody_has(node: Daemon, method: str, unknown: str) -> None:
    with refused(Code.NOT_FOUND, unknown):
        getattr(node.runtime, method)(BY_CONTAINER[method](unknown))


def test_a_pod_nobody_has(node: Daemon, image: str) -> None:
    with refused(Code.NOT_FOUND, "no-such-id"):
        node.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id="no-such-id"))
    request = cri.CreateContainerRequest(
        pod_sandbox_id="no-such-id",
        config=container_config("c", image, ["true"]),
        sandbox_config=sandbox_config("none", node.base),
    )
    with refused(Code.NOT_FOUND, "no-such-id"):
        node.runtime.CreateContainer(request)
    for call, message in (
        (node.runtime.StopContainer, cri.StopContainerRequest(container_id="no-such-id")),
        (node.runtime.RemoveContainer, cri.RemoveContainerRequest(container_id="no-such-id")),
        (node.runtime.StopPodSandbox, cri.StopPodSandboxRequest(pod_sandbox_id="no-such-id")),
        (node.runtime.RemovePodSandbox, cri.RemovePodSandboxRequest(pod_sandbox_id="no-such-id")),
    ):
        call(message)  # gone is gone


def test_a_pod_that_was_stopped(node: Daemon, image: str) -> None:
    pod = run_pod(node, "stopped")
    container = start(node, pod, image, "c", "sleep 1000")
    node.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    with refused(Code.FAILED_PRECONDITION, pod, "notready", "stopped on request"):
        create(node, pod, image, "late", "true")
    with refused(Code.FAILED_PRECONDITION, container, "exited"):
        node.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    with refused(Code.FAILED_PRECONDITION, container, "exited"):
        sh(node, container, "true")


# --- containers


def test_an_image_that_was_not_pulled(node: Daemon, pod: str) -> None:
    for name in ("registry.example/none:1", "Not A Name"):
        with refused(Code.NOT_FOUND, "config.image", name, "pull it first"):
            create(node, pod, name, "c", "true")


START_FAULTS = {
    "missing": (["/bin/no-such"], 127, "/bin/no-such"),
    "not-on-path": (["no-such"], 127, "no-such"),
    "not-executable": (["/etc/passwd"], 126, "/etc/passwd"),
    "directory": (["/etc"], 126, "/etc"),
}


@pytest.mark.parametrize("case", sorted(START_FAULTS))
def test_a_command_that_cannot_be_run(node: Daemon, pod: str, image: str, case: str) -> None:
    """kubelet shows the message and tries again later, so the container has to exist and its start has to fail."""
    argv, code, word = START_FAULTS[case]
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod,
        config=container_config(case, image, argv),
        sandbox_config=sandbox_config("faults", node.base),
    )
    container = node.runtime.CreateContainer(request).container_id
    with refused(Code.FAILED_PRECONDITION, container, word):
        node.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    ended = status(node, container)
    assert (ended.state, ended.exit_code, ended.reason) == (cri.CONTAINER_EXITED, code, "StartError")
    assert word in ended.message
    with refused(Code.FAILED_PRECONDITION, "exited"):
        sh(node, container, "true")


def test_a_program_of_another_format(node: Daemon, pod: str, image: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF no more")
    program.chmod(0o755)
    mount = cri.Mount(host_path=str(program), container_path="/program", readonly=True)
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod,
        config=container_config("format", image, ["/program"], mounts=[mount]),
        sandbox_config=sandbox_config("faults", node.base),
    )
    container = node.runtime.CreateContainer(request).container_id
    node.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    ended = wait_exit(node, container)
    assert ended.exit_code != 0
    assert "xec format error" in Path(ended.log_path).read_text()


def user(**fields: Any) -> Any:
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**fields))


def test_a_container_that_cannot_be(node: Daemon, pod: str, image: str) -> None:
    cases: list[tuple[dict[str, Any], Code, tuple[str, ...]]] = [
        ({"linux": user(run_as_username="nobody-knows")}, Code.INVALID_ARGUMENT, ("nobody-knows",)),
        ({"linux": user(capabilities={"add_capabilities": ["FLY"]})}, Code.INVALID_ARGUMENT, ("FLY",)),
        ({"working_dir": "relative"}, Code.INVALID_ARGUMENT, ("working_dir", "relative")),
        ({"stop_signal": 400}, Code.INVALID_ARGUMENT, ("stop_signal",)),
        (
            {"mounts": [cri.Mount(host_path="/etc/passwd/none", container_path="/v", readonly=True)]},
            Code.INVALID_ARGUMENT,
            ("mounts[0].host_path", "/etc/passwd/none"),
        ),
        (
            {"devices": [cri.Device(host_path="/dev/no-such", container_path="/dev/x", permissions="rwm")]},
            Code.INVALID_ARGUMENT,
            ("/dev/no-such",),
        ),
    ]
    for number, (fields, code, words) in enumerate(cases):
        with refused(code, *words):
            create(node, pod, image, f"odd{number}", "true", **fields)
    assert not [one for one in node.containers() if status(node, one).metadata.name.startswith("odd")]


def test_a_log_that_cannot_be_written(node: Daemon, pod: str, image: str) -> None:
    directory = node.base / "logs" / "faults"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "blocked.log").mkdir()
    with refused(Code.FAILED_PRECONDITION, "log_path", "blocked.log"):
        create(node, pod, image, "blocked", "true")
    (directory / "blocked.log").rmdir()
    (directory / "blocked.log").symlink_to("/etc/vmruntime-must-not-be-written")
    with refused(Code.FAILED_PRECONDITION, "log_path", "blocked.log"):
        create(node, pod, image, "blocked", "true")
    (directory / "blocked.log").unlink()
    container = start(node, pod, image, "blocked", "echo written")
    wait_exit(node, container)
    assert (directory / "blocked.log").read_text().endswith("stdout F written\n")


def test_exec_faults(node: Daemon, pod: str, image: str) -> None:
    container = start(node, pod, image, "execs", "sleep 1000")
    with contextlib.suppress(grpc.RpcError):
        answer = node.runtime.ExecSync(cri.ExecSyncRequest(container_id=container, cmd=["/bin/no-such"], timeout=10))
        assert answer.exit_code in (126, 127)
        assert b"/bin/no-such" in answer.stderr
    with refused(Code.INVALID_ARGUMENT, "cmd"):
        node.runtime.ExecSync(cri.ExecSyncRequest(container_id=container))
    with refused(Code.DEADLINE_EXCEEDED, "1"):
        sh(node, container, "sleep 60", timeout=1)
    assert sh(node, container, "ps | grep -c '[s]leep 60'").stdout.strip() == b"0"
