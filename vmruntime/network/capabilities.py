"""What plugins are told of a pod beside their configuration: CNI_ARGS and capability arguments.

Names and forms are those of CONVENTIONS.md in the CNI project and of containerd.
"""

from __future__ import annotations

from typing import Any

from vmruntime.model.sandbox import Sandbox, SandboxSpec

PORT_MAPPINGS = "portMappings"


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
    ports = [
        {
            "hostPort": mapping.host_port,
            "containerPort": mapping.container_port,
            "protocol": mapping.protocol.lower(),
            **({"hostIP": mapping.host_ip} if mapping.host_ip else {}),
        }
        for mapping in spec.port_mappings
        if mapping.host_port > 0
    ]
    return {PORT_MAPPINGS: ports} if ports else {}
