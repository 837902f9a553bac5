from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cri.conftest import container_config
from vmruntime.cri.translate.container import container_from_cri, container_status
from vmruntime.errors import InvalidArgument, Unimplemented
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Container, ContainerSpec, ContainerState, Device, SecurityProfile
from vmruntime.model.sandbox import NamespaceMode, SandboxKind, SandboxMetadata, SandboxSpec
from vmruntime.pods.oci.signals import signal_number


def translate(log_directory: str = "/logs", sandbox_privileged: bool = True, **config: Any) -> ContainerSpec:
    sandbox = SandboxSpec(
        metadata=SandboxMetadata(name="a", uid="b", namespace="c"),
        log_directory=log_directory,
        privileged=sandbox_privileged,
    )
    request = cri.CreateContainerRequest(pod_sandbox_id="x", config=container_config(**config))
    return container_from_cri(request, sandbox, supported=frozenset({SandboxKind.CONTAINER}))


def security(**values: Any) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**values))


def int64(value: int) -> cri.Int64Value:
    return cri.Int64Value(value=value)


MOUNTS = [
    cri.Mount(container_path="/data", host_path="/srv/data", propagation=cri.PROPAGATION_BIDIRECTIONAL),
    cri.Mount(container_path="/ro", host_path="/srv/ro", readonly=True, recursive_read_only=True),
    cri.Mount(
        container_path="/img",
        readonly=True,
        image=cri.ImageSpec(image="sha256:1"),
        image_sub_path="a/b",
        mount_options=["noexec"],
    ),
]


def test_everything_is_carried_over() -> None:
    spec = translate(
        command=["/bin/a"],
        args=["b"],
        working_dir="/w",
        envs=[cri.KeyValue(key="A", value="ж=1".encode()), cri.KeyValue(key="B")],
        mounts=MOUNTS,
        devices=[cri.Device(container_path="/dev/x", host_path="/dev/y", permissions="mrw")],
        CDI_devices=[cri.CDIDevice(name="vendor.com/gpu=gpu0")],
        stdin=True,
        stdin_once=True,
        tty=True,
        stop_signal=cri.SIGNAL_SIGRTMINPLUS3,
        linux=cri.LinuxContainerConfig(
            resources=cri.LinuxContainerResources(
                cpu_shares=100,
                memory_limit_in_bytes=2**30,
                hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=2**21)],
                unified={"memory.high": "1000"},
            ),
            security_context=cri.LinuxContainerSecurityContext(
                capabilities=cri.Capability(add_capabilities=["NET_ADMIN"], drop_capabilities=["ALL"]),
                privileged=True,
                namespace_options=cri.NamespaceOption(pid=cri.TARGET, target_id="t"),
                run_as_user=int64(0),
                run_as_group=int64(5),
                readonly_rootfs=True,
                supplemental_groups=[1, 2],
                supplemental_groups_policy=cri.Strict,
                no_new_privs=True,
                masked_paths=["/proc/x"],
                readonly_paths=["/proc/y"],
                seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost, localhost_ref="/p.json"),
                apparmor=cri.SecurityProfile(profile_type=cri.SecurityProfile.Unconfined),
                selinux_options=cri.SELinuxOption(level="s0"),
            ),
        ),
    )
    assert (spec.image, spec.user_image, spec.metadata.attempt) == ("sha256:abc", "busybox:1", 2)
    assert spec.envs == [("A", "ж=1"), ("B", "")]
    assert spec.log_path == "/logs/main/0.log"
    assert spec.devices == [Device(container_path="/dev/x", host_path="/dev/y", permissions="mrw")]
    assert (spec.cdi_devices, spec.stop_signal) == (["vendor.com/gpu=gpu0"], "SIGRTMIN+3")
    assert [mount.propagation for mount in spec.mounts] == ["rshared", "private", "private"]
    assert (spec.mounts[1].recursive_readonly, spec.mounts[2].image, spec.mounts[2].options) == (
        True,
        "sha256:1",
        ["noexec"],
    )
    assert (spec.resources.hugepage_limits, spec.resources.unified) == ({"2MB": 2**21}, {"memory.high": "1000"})
    context = spec.security
    assert (context.run_as_user, context.run_as_group, context.supplemental_groups) == (0, 5, [1, 2])
    assert context.supplemental_groups_strict
    assert context.privileged
    assert context.readonly_rootfs
    assert context.no_new_privs
    assert context.selinux_given
    assert context.seccomp == SecurityProfile(kind="localhost", path="/p.json")
    assert context.apparmor == SecurityProfile(kind="unconfined")
    assert (context.namespaces.pid, context.namespaces.target_id) == (NamespaceMode.TARGET, "t")


def test_status_returns_what_was_given() -> None:
    resources = cri.LinuxContainerResources(
        cpu_period=100000, cpu_quota=5000, cpu_shares=7, memory_limit_in_bytes=9, oom_score_adj=-3, cpuset_cpus="0-1",
        cpuset_mems="0", hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=4)], unified={"io.weight": "1"},
        memory_swap_limit_in_bytes=11,
    )  # fmt: skip
    spec = translate(mounts=MOUNTS, linux=cri.LinuxContainerConfig(resources=resources))
    container = Container(id="i", sandbox_id="s", spec=spec, state=ContainerState.CREATED, created_at=1, stop_signal=64)
    status = container_status(container)
    assert list(status.mounts) == MOUNTS
    assert status.resources.linux == resources
    assert (status.stop_signal, status.HasField("user")) == (cri.SIGNAL_SIGRTMAX, False)


@pytest.mark.parametrize("value", cri.Signal.values())
def test_every_signal_goes_there_and_back(value: cri.Signal.ValueType) -> None:
    name = translate(stop_signal=value).stop_signal
    if value == cri.SIGNAL_RUNTIME_DEFAULT:
        assert name == ""
        return
    container = Container(
        id="i",
        sandbox_id="s",
        spec=translate(),
        state=ContainerState.CREATED,
        created_at=1,
        stop_signal=signal_number(name),
    )
    back = container_status(container).stop_signal
    aliases = {
        cri.SIGNAL_SIGCLD: cri.SIGNAL_SIGCHLD,
        cri.SIGNAL_SIGIOT: cri.SIGNAL_SIGABRT,
        cri.SIGNAL_SIGPOLL: cri.SIGNAL_SIGIO,
    }
    assert back == aliases.get(value, value)


@pytest.mark.parametrize(
    ("old", "kind", "path"),
    [
        ("", "unconfined", ""),
        ("unconfined", "unconfined", ""),
        ("runtime/default", "runtime/default", ""),
        ("docker/default", "runtime/default", ""),
        ("localhost//var/lib/kubelet/seccomp/a.json", "localhost", "/var/lib/kubelet/seccomp/a.json"),
    ],
)
def test_deprecated_profiles(old: str, kind: str, path: str) -> None:
    context = translate(linux=security(seccomp_profile_path=old)).security
    assert context.seccomp == SecurityProfile(kind=kind, path=path)


def test_logs_are_dropped_without_a_directory_or_a_path() -> None:
    assert translate(log_directory="").log_path == ""
    assert translate(log_path="").log_path == ""


def test_privileged_needs_a_privileged_sandbox() -> None:
    with pytest.raises(InvalidArgument, match="privileged"):
        translate(sandbox_privileged=False, linux=security(privileged=True))


def test_host_namespaces_need_host_pods() -> None:
    options = cri.NamespaceOption(network=cri.NODE)
    with pytest.raises(Unimplemented, match="namespace_options.network"):
        translate(linux=security(namespace_options=options))


def test_an_environment_value_is_never_told() -> None:
    for value in (b"s3cret\0", b"s3cret\xff", b"s3cret" * 100_000):
        with pytest.raises(InvalidArgument) as caught:
            translate(envs=[cri.KeyValue(key="PASSWORD", value=value)])
        assert "s3cret" not in str(caught.value)
        assert "PASSWORD" in str(caught.value)


CONTEXT = "config.linux.security_context"
BAD: list[tuple[str, dict[str, Any]]] = [
    ("config.metadata.name", {"metadata": cri.ContainerMetadata()}),
    ("config.image.image", {"image": cri.ImageSpec()}),
    ("config.command[0]", {"command": ["a\0"]}),
    ("config.args[1]", {"args": ["", "x" * 200_000]}),
    ("config.args", {"args": ["x"] * 5000}),
    ("config.working_dir", {"working_dir": "w"}),
    ("config.envs[0].key", {"envs": [cri.KeyValue(value=b"x")]}),
    ("config.envs[0].key", {"envs": [cri.KeyValue(key="A=B")]}),
    ("config.log_path", {"log_path": "/abs/0.log"}),
    ("config.log_path", {"log_path": "../../etc/passwd"}),
    ("config.log_path", {"log_path": "a/../../b"}),
    ("config.log_path", {"log_path": "."}),
    ("config.log_path", {"log_path": "a/"}),
    ("config.mounts[0].container_path", {"mounts": [cri.Mount(host_path="/a")]}),
    ("config.mounts[0].container_path", {"mounts": [cri.Mount(host_path="/a", container_path="/a/../b")]}),
    ("config.mounts[0].host_path", {"mounts": [cri.Mount(container_path="/a")]}),
    ("config.mounts[0].propagation", {"mounts": [cri.Mount(container_path="/a", host_path="/b", propagation=7)]}),  # type: ignore[arg-type]
    ("config.mounts[0]: host_path and image",
     {"mounts": [cri.Mount(container_path="/a", host_path="/b", image=cri.ImageSpec(image="i"))]}),
    ("config.mounts[0].recursive_read_only",
     {"mounts": [cri.Mount(container_path="/a", host_path="/b", recursive_read_only=True)]}),
    ("config.mounts[0].mount_options[0]",
     {"mounts": [cri.Mount(container_path="/a", host_path="/b", mount_options=["a,b"])]}),
    ("config.mounts[0].image_sub_path",
     {"mounts": [cri.Mount(container_path="/a", image=cri.ImageSpec(image="i"), readonly=True, image_sub_path="../x")]}),
    ("config.mounts[0].readonly", {"mounts": [cri.Mount(container_path="/a", image=cri.ImageSpec(image="i"))]}),
    ("config.devices[0].permissions",
     {"devices": [cri.Device(container_path="/dev/a", host_path="/dev/a", permissions="rx")]}),
    ("config.CDI_devices[0].name", {"CDI_devices": [cri.CDIDevice(name="gpu")]}),
    ("config.stop_signal", {"stop_signal": 1000}),
    ("config.windows", {"windows": cri.WindowsContainerConfig()}),
    (f"{CONTEXT}.run_as_user", {"linux": security(run_as_user=int64(-1))}),
    (f"{CONTEXT}.run_as_user", {"linux": security(run_as_user=int64(2**32 - 1))}),
    (f"{CONTEXT}: run_as_user 1 and run_as_username", {"linux": security(run_as_user=int64(1), run_as_username="x")}),
    (f"{CONTEXT}.run_as_group", {"linux": security(run_as_group=int64(1))}),
    (f"{CONTEXT}.run_as_username", {"linux": security(run_as_username="a:b")}),
    (f"{CONTEXT}.supplemental_groups[0]", {"linux": security(supplemental_groups=[-1])}),
    (f"{CONTEXT}.supplemental_groups_policy", {"linux": security(supplemental_groups_policy=4)}),
    (f"{CONTEXT}.masked_paths[0]", {"linux": security(masked_paths=["x"])}),
    (f"{CONTEXT}.seccomp.profile_type", {"linux": security(seccomp=cri.SecurityProfile(profile_type=8))}),  # type: ignore[arg-type]
    (f"{CONTEXT}.seccomp.localhost_ref", {"linux": security(seccomp=cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost))}),
    (f"{CONTEXT}.seccomp.localhost_ref", {"linux": security(seccomp=cri.SecurityProfile(localhost_ref="/x"))}),
    (f"{CONTEXT}.seccomp_profile_path", {"linux": security(seccomp_profile_path="what")}),
    (f"{CONTEXT}.namespace_options.target_id", {"linux": security(namespace_options=cri.NamespaceOption(pid=cri.TARGET))}),
    ("config.linux.resources.cpu_shares",
     {"linux": cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(cpu_shares=-1))}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "config"), BAD)
def test_bad_fields_are_named(field: str, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        translate(**config)
    assert str(caught.value).startswith(field)
    assert len(str(caught.value)) < 500
