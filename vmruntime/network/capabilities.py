"""What plugins are told of a pod beside their configuration: CNI_ARGS and capability arguments.

Names and forms are those of CONVENTIONS.md in the CNI project and of containerd.
"""

from __future__ import annotations

from typing import Any

from vmruntime.model.sandbox import Sandbox, SandboxSpec

PORT_MAPPINGS = "portMappings"
BANDWIDTH = "bandwidth"
DNS = "dns"
POD_ANNOTATIONS = "io.kubernetes.cri.pod-annotations"

BURST_SECONDS = 0.1
LEAST_BURST = 8 * 128 * 1024  # bits: two of the largest packets that segmentation offload makes
MOST_BURST = 2**31 - 1  # bits; the plugin's counter has 32 of them


def cni_args(sandbox: Sandbox) -> str:
    """Return CNI_ARGS as Kubernetes runtimes give them; a value that would break out of its place is left out."""
    metadata = sandbox.spec.metadata
    arguments = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": metadata.namespace,
        "K8S_POD_NAME": metadata.name,
        "K8S_POD_INFRA_CONTAINER_ID": sandbox.id,
        "K8S_POD_UID": metadata.uid,
    }
    return ";".join(f"{key}={value}" for key, value in arguments.items() if not set(";=\0") & set(value))


def capabilities(spec: SandboxSpec) -> dict[str, Any]:
    """Return the arguments of each capability that the pod makes use of."""
    dns = {"servers": spec.dns.servers, "searches": spec.dns.searches, "options": spec.dns.options}
    arguments: dict[str, Any] = {
        PORT_MAPPINGS: _port_mappings(spec),
        BANDWIDTH: _bandwidth(spec),
        DNS: {key: words for key, words in dns.items() if words},
        POD_ANNOTATIONS: spec.annotations,
    }
    return {key: value for key, value in arguments.items() if value}


def _port_mappings(spec: SandboxSpec) -> list[dict[str, Any]]:
    return [
        {
            "hostPort": mapping.host_port,
            "containerPort": mapping.container_port,
            "protocol": mapping.protocol.lower(),
            **({"hostIP": mapping.host_ip} if mapping.host_ip else {}),
        }
        for mapping in spec.port_mappings
        if mapping.host_port > 0
    ]


def _bandwidth(spec: SandboxSpec) -> dict[str, int]:
    limits: dict[str, int] = {}
    for direction, rate in (("ingress", spec.bandwidth.ingress), ("egress", spec.bandwidth.egress)):
        if rate:
            limits[f"{direction}Rate"] = rate
            limits[f"{direction}Burst"] = min(max(int(rate * BURST_SECONDS), LEAST_BURST), MOST_BURST)
    return limits
