from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cri.conftest import sandbox_config
from vmruntime.cri.translate.sandbox import sandbox_from_cri
from vmruntime.errors import InvalidArgument, Unimplemented
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import NamespaceMode, PortMapping, SandboxKind, SandboxSpec

CONTAINER = frozenset({SandboxKind.CONTAINER})
EVERY = frozenset(SandboxKind)


def translate(
    handler: str = "",
    supported: frozenset[SandboxKind] = CONTAINER,
    default: SandboxKind = SandboxKind.CONTAINER,
    **config: Any,
) -> SandboxSpec:
    request = cri.RunPodSandboxRequest(config=sandbox_config(**config), runtime_handler=handler)
    return sandbox_from_cri(request, default_kind=default, supported=supported)


def linux(**values: Any) -> cri.LinuxPodSandboxConfig:
    return cri.LinuxPodSandboxConfig(**values)


def with_namespaces(**modes: Any) -> cri.LinuxPodSandboxConfig:
    options = cri.NamespaceOption(**modes)
    return linux(security_context=cri.LinuxSandboxSecurityContext(namespace_options=options))


def test_everything_is_carried_over() -> None:
    spec = translate(
        handler="container",
        dns_config=cri.DNSConfig(servers=["10.0.0.10", "fd00::a"], searches=["svc.local"], options=["ndots:5"]),
        port_mappings=[
            cri.PortMapping(protocol=cri.UDP, container_port=53, host_port=5353, host_ip="127.0.0.1"),
            cri.PortMapping(container_port=80),
        ],
        labels={"a": "b"},
        annotations={"c": "d"},
        linux=linux(
            cgroup_parent="/kubepods/pod1",
            sysctls={"net.ipv4.ip_forward": "1", "net/ipv4/conf/eth0.1/forwarding": "1", "kernel.shm_rmid_forced": "0"},
            overhead=cri.LinuxContainerResources(memory_limit_in_bytes=7),
            resources=cri.LinuxContainerResources(cpu_quota=-1, cpu_period=100000),
            security_context=cri.LinuxSandboxSecurityContext(
                privileged=True, namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)
            ),
        ),
    )
    assert (spec.kind, spec.runtime_handler, spec.hostname) == (SandboxKind.CONTAINER, "container", "web")
    assert spec.metadata.key == "web_default_uid-web_1"
    assert spec.log_directory == "/var/log/pods/web"
    assert (spec.dns.servers, spec.dns.searches, spec.dns.options) == (
        ["10.0.0.10", "fd00::a"], ["svc.local"], ["ndots:5"],
    )  # fmt: skip
    assert spec.port_mappings == [PortMapping(protocol="udp", container_port=53, host_port=5353, host_ip="127.0.0.1")]
    assert spec.sysctls == {
        "net.ipv4.ip_forward": "1",
        "net.ipv4.conf.eth0/1.forwarding": "1",
        "kernel.shm_rmid_forced": "0",
    }
    assert (spec.cgroup_parent, spec.privileged) == ("/kubepods/pod1", True)
    assert spec.overhead == LinuxResources(memory_limit=7)
    assert spec.resources == LinuxResources(cpu_quota=-1, cpu_period=100000)
    assert spec.namespaces.pid is NamespaceMode.CONTAINER
    assert (spec.labels, spec.annotations) == ({"a": "b"}, {"c": "d"})


@pytest.mark.parametrize(
    ("annotations", "handler", "default", "kind"),
    [
        ({}, "", SandboxKind.CONTAINER, SandboxKind.CONTAINER),
        ({}, "", SandboxKind.HOST, SandboxKind.HOST),
        ({}, "image", SandboxKind.CONTAINER, SandboxKind.IMAGE),
        ({"vmruntime.io/kind": "host"}, "image", SandboxKind.CONTAINER, SandboxKind.HOST),
        ({"kubernetes.io/target-runtime": "virtlet.cloud"}, "", SandboxKind.CONTAINER, SandboxKind.IMAGE),
        ({"kubernetes.io/target-runtime": "other"}, "", SandboxKind.CONTAINER, SandboxKind.CONTAINER),
        (
            {"kubernetes.io/target-runtime": "virtlet.cloud", "vmruntime.io/kind": "container"},
            "",
            SandboxKind.HOST,
            SandboxKind.CONTAINER,
        ),
    ],
)
def test_choice_of_kind(annotations: dict[str, str], handler: str, default: SandboxKind, kind: SandboxKind) -> None:
    assert translate(handler, EVERY, default, annotations=annotations).kind is kind


def test_kinds_that_are_not_built_say_why_they_were_chosen() -> None:
    with pytest.raises(Unimplemented, match="image pods .*runtime handler 'image'.* it runs: container"):
        translate("image")
    with pytest.raises(Unimplemented, match="host pods .*annotation vmruntime.io/kind=host"):
        translate(annotations={"vmruntime.io/kind": "host"})


def test_unknown_kinds_are_named_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"runtime_handler: 'kata' .*container, image, host"):
        translate("kata")
    with pytest.raises(InvalidArgument, match=r"annotation vmruntime.io/kind: 'vm' must be one of container, image"):
        translate(annotations={"vmruntime.io/kind": "vm"})


@pytest.mark.parametrize("which", ["network", "pid", "ipc"])
def test_host_namespaces_need_host_pods(which: str) -> None:
    with pytest.raises(Unimplemented, match=rf"config.linux.security_context.namespace_options.{which}: NODE"):
        translate(linux=with_namespaces(**{which: cri.NODE}))
    spec = translate(supported=EVERY, linux=with_namespaces(**{which: cri.NODE}))
    assert getattr(spec.namespaces, which) is NamespaceMode.NODE


def test_a_missing_host_name_is_made_from_the_pods() -> None:
    assert translate(name="My_Pod.Name", hostname="").hostname == "my-pod-name"
    assert translate(name="___", hostname="").hostname == "localhost"
    assert len(translate(name="x" * 200, hostname="").hostname) == 63


BAD: list[tuple[str, dict[str, Any]]] = [
    ("config.metadata.name", {"metadata": cri.PodSandboxMetadata(uid="u", namespace="n")}),
    ("config.metadata.uid", {"metadata": cri.PodSandboxMetadata(name="a", namespace="n")}),
    ("config.metadata.namespace", {"metadata": cri.PodSandboxMetadata(name="a", uid="u")}),
    ("config.metadata.name", {"metadata": cri.PodSandboxMetadata(name="a\0", uid="u", namespace="n")}),
    ("config.metadata.name", {"metadata": cri.PodSandboxMetadata(name="a" * 5000, uid="u", namespace="n")}),
    ("config.hostname", {"hostname": "under_score"}),
    ("config.hostname", {"hostname": "-x"}),
    ("config.hostname", {"hostname": "a..b"}),
    ("config.hostname", {"hostname": "a." * 40}),
    ("config.hostname", {"hostname": "x\ny"}),
    ("config.log_directory", {"log_directory": "var/log"}),
    ("config.log_directory", {"log_directory": "/var/../etc"}),
    ("config.dns_config.servers[0]", {"dns_config": cri.DNSConfig(servers=["dns.example"])}),
    ("config.dns_config.searches[1]", {"dns_config": cri.DNSConfig(searches=["a", "b\nnameserver 1.1.1.1"])}),
    ("config.dns_config.options[0]", {"dns_config": cri.DNSConfig(options=["a b"])}),
    ("config.port_mappings[0].host_port", {"port_mappings": [cri.PortMapping(host_port=70000)]}),
    ("config.port_mappings[0].host_port", {"port_mappings": [cri.PortMapping(host_port=-1)]}),
    ("config.port_mappings[0].container_port", {"port_mappings": [cri.PortMapping(host_port=80)]}),
    ("config.port_mappings[0].protocol", {"port_mappings": [cri.PortMapping(protocol=9)]}),  # type: ignore[arg-type]
    ("config.port_mappings[0].host_ip", {"port_mappings": [cri.PortMapping(host_ip="x")]}),
    ("config.labels", {"labels": {"a": "b\0"}}),
    ("config.annotations", {"annotations": {"a": "b" * 2_000_000}}),
    ("config.linux.cgroup_parent", {"linux": linux(cgroup_parent="/a/../b")}),
    ("config.linux.cgroup_parent", {"linux": linux(cgroup_parent="a/b")}),
    ("config.linux.sysctls", {"linux": linux(sysctls={"../etc": "1"})}),
    ("config.linux.sysctls", {"linux": linux(sysctls={"net..x": "1"})}),
    ("config.linux.overhead.memory_limit_in_bytes",
     {"linux": linux(overhead=cri.LinuxContainerResources(memory_limit_in_bytes=-1))}),
    ("config.linux.resources.cpu_quota", {"linux": linux(resources=cri.LinuxContainerResources(cpu_quota=-2))}),
    ("config.linux.resources.cpu_period", {"linux": linux(resources=cri.LinuxContainerResources(cpu_period=5))}),
    ("config.linux.resources.oom_score_adj", {"linux": linux(resources=cri.LinuxContainerResources(oom_score_adj=1001))}),
    ("config.linux.resources.cpuset_cpus", {"linux": linux(resources=cri.LinuxContainerResources(cpuset_cpus="0;1"))}),
    ("config.linux.resources.unified",
     {"linux": linux(resources=cri.LinuxContainerResources(unified={"../memory.max": "1"}))}),
    ("config.linux.resources.unified",
     {"linux": linux(resources=cri.LinuxContainerResources(unified={"cgroup.procs": "1"}))}),
    ("config.linux.resources.hugepage_limits[0].page_size",
     {"linux": linux(resources=cri.LinuxContainerResources(hugepage_limits=[cri.HugepageLimit(page_size="2 MB")]))}),
    ("config.linux.security_context.namespace_options.network", {"linux": with_namespaces(network=cri.CONTAINER)}),
    ("config.linux.security_context.namespace_options.pid", {"linux": with_namespaces(pid=cri.TARGET)}),
    ("config.linux.security_context.namespace_options.ipc", {"linux": with_namespaces(ipc=44)}),
    ("config.linux.security_context.run_as_group",
     {"linux": linux(security_context=cri.LinuxSandboxSecurityContext(run_as_group=cri.Int64Value(value=1)))}),
    ("config.windows", {"windows": cri.WindowsPodSandboxConfig()}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "config"), BAD)
def test_bad_fields_are_named(field: str, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        translate(**config)
    assert str(caught.value).startswith(field)
    assert len(str(caught.value)) < 500
