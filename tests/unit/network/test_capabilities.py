"""What plugins are told of a pod."""

from __future__ import annotations

import pytest

from tests.unit.network.conftest import SANDBOX_ID, sandbox
from vmruntime.model.sandbox import Bandwidth, Dns, PortMapping, Sandbox, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.network.capabilities import capabilities, cni_args


def test_arguments_of_kubernetes() -> None:
    assert cni_args(sandbox()).split(";") == [
        "IgnoreUnknown=1",
        "K8S_POD_NAMESPACE=default",
        "K8S_POD_NAME=web",
        f"K8S_POD_INFRA_CONTAINER_ID={SANDBOX_ID}",
        "K8S_POD_UID=uid-web",
    ]


@pytest.mark.parametrize("name", ["a;CNI_X=1", "a=b", "a\0b"])
def test_a_value_that_would_break_out_is_left_out(name: str) -> None:
    metadata = SandboxMetadata(name=name, uid="u", namespace="n")
    spec = SandboxSpec(metadata=metadata)
    given = cni_args(Sandbox(id="1", spec=spec, state=SandboxState.CREATING, created_at=0))
    assert given == "IgnoreUnknown=1;K8S_POD_NAMESPACE=n;K8S_POD_INFRA_CONTAINER_ID=1;K8S_POD_UID=u"


def test_host_ports() -> None:
    mappings = [
        PortMapping(protocol="TCP", container_port=80, host_port=8080),
        PortMapping(protocol="udp", container_port=53, host_port=5353, host_ip="127.0.0.1"),
        PortMapping(protocol="tcp", container_port=81, host_port=0),
    ]
    assert capabilities(sandbox(port_mappings=mappings).spec) == {
        "portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
        ]
    }
    assert capabilities(sandbox().spec) == {}


@pytest.mark.parametrize(
    ("bandwidth", "arguments"),
    [
        (Bandwidth(ingress=100_000_000), {"ingressRate": 100_000_000, "ingressBurst": 10_000_000}),
        (Bandwidth(egress=1000), {"egressRate": 1000, "egressBurst": 1_048_576}),
        (
            Bandwidth(ingress=10**15, egress=20_000_000),
            {"ingressRate": 10**15, "ingressBurst": 2**31 - 1, "egressRate": 20_000_000, "egressBurst": 2_000_000},
        ),
    ],
)
def test_bandwidth(bandwidth: Bandwidth, arguments: dict[str, int]) -> None:
    assert capabilities(sandbox(bandwidth=bandwidth).spec) == {"bandwidth": arguments}


def test_what_only_some_plugins_want_to_know() -> None:
    dns = Dns(servers=["10.0.0.10"], options=["ndots:5"])
    assert capabilities(sandbox(dns=dns, annotations={"a": "b"}).spec) == {
        "dns": {"servers": ["10.0.0.10"], "options": ["ndots:5"]},
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
    }
