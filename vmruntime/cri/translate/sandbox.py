"""Pod sandboxes: RunPodSandbox's configuration in, status and list entries out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from vmruntime.cri.translate.bandwidth import bandwidth_from_annotations
from vmruntime.cri.translate.checks import (
    LIST_LIMIT,
    NAME_LIMIT,
    PATH_LIMIT,
    absolute_path,
    bad,
    hostname,
    ip_address,
    missing,
    number,
    required,
    resolv_word,
    shorten,
    sysctl_name,
    text,
    text_map,
)
from vmruntime.cri.translate.image_pod import image_pod_from_annotations
from vmruntime.cri.translate.resources import resources_from_cri
from vmruntime.cri.translate.security import namespaces_from_cri, namespaces_to_cri
from vmruntime.cri.translate.userns import check_sandbox
from vmruntime.errors import InvalidArgument, Unimplemented
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.sandbox import (
    Dns,
    NamespaceMode,
    Namespaces,
    PortMapping,
    Sandbox,
    SandboxKind,
    SandboxMetadata,
    SandboxSpec,
    SandboxState,
)

KIND_ANNOTATION = "vmruntime.io/kind"
# Virtlet's way of choosing itself (its CRI proxy routed by this annotation).
TARGET_RUNTIME_ANNOTATION = "kubernetes.io/target-runtime"
VIRTLET_RUNTIME = "virtlet.cloud"
HANDLERS = {kind.value: kind for kind in SandboxKind}

DEFAULT_ORIGIN = "the configured default_kind"

_PROTOCOLS = {0: "tcp", 1: "udp", 2: "sctp"}
_NOT_IN_HOSTNAME = re.compile(r"[^a-z0-9-]+")


def asked_kind(annotations: Mapping[str, str], runtime_handler: str) -> tuple[SandboxKind, str] | None:
    """Return the kind that a pod asks for, by annotation, else by runtime handler, and what says so; None: it does not.

    Raises:
        InvalidArgument: The annotation or the handler is unknown.
    """
    found = None
    if runtime_handler:
        known = HANDLERS.get(runtime_handler)
        if known is None:
            names = ", ".join(HANDLERS)
            raise bad(
                "runtime_handler",
                runtime_handler,
                f"names no handler of this runtime; known: {names}",
                remedy="correct the RuntimeClass's handler",
            )
        found = known, f"runtime handler {runtime_handler!r}"
    if annotations.get(TARGET_RUNTIME_ANNOTATION) == VIRTLET_RUNTIME:
        found = SandboxKind.IMAGE, f"annotation {TARGET_RUNTIME_ANNOTATION}={VIRTLET_RUNTIME}"
    if KIND_ANNOTATION in annotations:
        asked = annotations[KIND_ANNOTATION]
        known = HANDLERS.get(asked)
        if known is None:
            raise bad(f"annotation {KIND_ANNOTATION}", asked, f"must be one of {', '.join(HANDLERS)}")
        found = known, f"annotation {KIND_ANNOTATION}={asked}"
    return found


def select_kind(
    annotations: dict[str, str],
    runtime_handler: str,
    default: SandboxKind,
    supported: frozenset[SandboxKind],
    *,
    needs_host: str = "",
) -> SandboxKind:
    """Choose what boots for a pod: annotation, else runtime handler, else the host when it must, else the default.

    Args:
        annotations: The pod's.
        runtime_handler: As given.
        default: For pods that do not say.
        supported: What this daemon runs.
        needs_host: Why the pod can only run on the host, such as "network: NODE"; empty: it need not.

    Raises:
        InvalidArgument: The annotation or the handler is unknown.
        Unimplemented: The kind exists but this version does not run it.
    """
    kind, origin = asked_kind(annotations, runtime_handler) or (default, DEFAULT_ORIGIN)
    if needs_host and origin == DEFAULT_ORIGIN and SandboxKind.HOST in supported:
        kind, origin = SandboxKind.HOST, f"namespace_options.{needs_host}"
    if needs_host and kind is not SandboxKind.HOST and SandboxKind.HOST in supported:
        raise InvalidArgument(
            f"config.linux.security_context: {needs_host}, the host's, cannot be had by a pod of kind {kind.value},"
            f" which {origin} asks for",
            remedy="leave out the kind, or choose host",
        )
    if kind not in supported:
        names = ", ".join(sorted(k.value for k in supported)) or "none"
        raise Unimplemented(f"{kind.value} pods (chosen by {origin}) are not built in this version; it runs: {names}")
    return kind


def _check_host_sysctls(name: str, sysctls: dict[str, str], namespaces: Namespaces) -> None:
    """Refuse what would change the host: a host pod may set parameters of its own namespaces only."""
    for key in sysctls:
        own_network = key.startswith("net.") and namespaces.network is not NamespaceMode.NODE
        of_ipc = key.startswith(("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."))
        if not own_network and not (of_ipc and namespaces.ipc is not NamespaceMode.NODE):
            raise InvalidArgument(
                f"{name}[{key}]: {shorten(sysctls[key])} cannot be set by a pod on the host without changing the host",
                remedy="run the pod in a VM, or leave out the host's namespace that it belongs to",
            )


def _needs_host(namespaces: Namespaces, *, privileged: bool) -> str:
    """Return why a pod can only run on the host; empty: it need not."""
    for name in ("network", "pid", "ipc"):
        if getattr(namespaces, name) is NamespaceMode.NODE:
            return f"{name}: NODE"
    return "privileged (host_pods is privileged)" if privileged else ""


def sandbox_from_cri(
    request: cri.RunPodSandboxRequest,
    *,
    default_kind: SandboxKind,
    supported: frozenset[SandboxKind],
    privileged_on_host: bool = False,
) -> SandboxSpec:
    """Translate RunPodSandbox; with `privileged_on_host` privileged pods run on the host.

    Raises:
        InvalidArgument: A field is missing or cannot be used; the message names it.
        Unimplemented: A field asks for what this version does not do.
    """
    if not request.HasField("config"):
        raise missing("config")
    config = request.config
    text("runtime_handler", request.runtime_handler, limit=NAME_LIMIT)
    metadata = _metadata("config.metadata", config)
    if config.HasField("windows"):
        raise InvalidArgument("config.windows: this runtime runs Linux pods")
    annotations = text_map("config.annotations", config.annotations)
    linux = config.linux
    security = linux.security_context
    context = "config.linux.security_context"
    namespaces = namespaces_from_cri(
        f"{context}.namespace_options",
        security.namespace_options,
        host_supported=SandboxKind.HOST in supported,
        container=False,
    )
    check_sandbox(f"{context}.namespace_options", namespaces)
    needs_host = _needs_host(namespaces, privileged=security.privileged and privileged_on_host)
    kind = select_kind(annotations, request.runtime_handler, default_kind, supported, needs_host=needs_host)
    if namespaces.user_namespace is not None and kind is SandboxKind.IMAGE:
        raise InvalidArgument(
            f"{context}.namespace_options.userns_options.mode: POD means nothing in a pod of kind image, which has its own"
            " users",
            remedy="leave out hostUsers: false",
        )
    sysctls = _sysctls("config.linux.sysctls", linux)
    if kind is SandboxKind.IMAGE and sysctls:
        raise InvalidArgument(
            f"config.linux.sysctls: {', '.join(sorted(sysctls))} cannot be set in a pod of kind image, which boots a kernel"
            " of its own",
            remedy="write them into the guest's /etc/sysctl.d by cloud-init (vmruntime.io/cloud-init-user-data)",
        )
    if kind is SandboxKind.HOST:
        _check_host_sysctls("config.linux.sysctls", sysctls, namespaces)
    if security.HasField("run_as_group") and not security.HasField("run_as_user"):
        raise bad(
            f"{context}.run_as_group",
            security.run_as_group.value,
            "has no user beside it",
            remedy="set run_as_user as well",
        )
    return SandboxSpec(
        metadata=metadata,
        kind=kind,
        runtime_handler=request.runtime_handler,
        hostname=_hostname(config.hostname, metadata.name),
        log_directory=_log_directory(config.log_directory),
        dns=_dns("config.dns_config", config.dns_config),
        port_mappings=_port_mappings("config.port_mappings", config),
        bandwidth=bandwidth_from_annotations(annotations),
        labels=text_map("config.labels", config.labels),
        annotations=annotations,
        cgroup_parent=_cgroup_parent("config.linux.cgroup_parent", linux.cgroup_parent),
        sysctls=sysctls,
        namespaces=namespaces,
        privileged=security.privileged,
        overhead=(resources_from_cri("config.linux.overhead", linux.overhead) if linux.HasField("overhead") else None),
        resources=(
            resources_from_cri("config.linux.resources", linux.resources) if linux.HasField("resources") else None
        ),
        image_pod=image_pod_from_annotations(annotations) if kind is SandboxKind.IMAGE else None,
    )


def state_to_cri(state: SandboxState) -> cri.PodSandboxState.ValueType:
    """CRI knows ready and everything else."""
    return cri.SANDBOX_READY if state is SandboxState.READY else cri.SANDBOX_NOTREADY


def metadata_to_cri(metadata: SandboxMetadata) -> cri.PodSandboxMetadata:
    """Translate the name back."""
    return cri.PodSandboxMetadata(
        name=metadata.name, uid=metadata.uid, namespace=metadata.namespace, attempt=metadata.attempt
    )


def sandbox_item(sandbox: Sandbox) -> cri.PodSandbox:
    """Translate one entry of ListPodSandbox."""
    return cri.PodSandbox(
        id=sandbox.id,
        metadata=metadata_to_cri(sandbox.spec.metadata),
        state=state_to_cri(sandbox.state),
        created_at=sandbox.created_at,
        labels=sandbox.spec.labels,
        annotations=sandbox.spec.annotations,
        runtime_handler=sandbox.spec.runtime_handler,
    )


def sandbox_status(sandbox: Sandbox) -> cri.PodSandboxStatus:
    """Translate a sandbox's status. A stopped sandbox has given its addresses back, so it shows none."""
    ips = sandbox.network.ips if sandbox.network and sandbox.state is SandboxState.READY else []
    return cri.PodSandboxStatus(
        id=sandbox.id,
        metadata=metadata_to_cri(sandbox.spec.metadata),
        state=state_to_cri(sandbox.state),
        created_at=sandbox.created_at,
        network=cri.PodSandboxNetworkStatus(
            ip=ips[0] if ips else "", additional_ips=[cri.PodIP(ip=ip) for ip in ips[1:]]
        ),
        linux=cri.LinuxPodSandboxStatus(namespaces=cri.Namespace(options=namespaces_to_cri(sandbox.spec.namespaces))),
        labels=sandbox.spec.labels,
        annotations=sandbox.spec.annotations,
        runtime_handler=sandbox.spec.runtime_handler,
    )


def sandbox_info(sandbox: Sandbox, network_check: str, facts: Mapping[str, object]) -> dict[str, str]:
    """Return what `crictl inspectp` shows beside the status; the value is JSON, as CRI asks."""
    network = sandbox.network
    info = {
        "kind": sandbox.spec.kind.value,
        "state": sandbox.state.value,
        "reason": sandbox.reason,
        "hostname": sandbox.spec.hostname,
        "kernel": sandbox.kernel,
        "source": sandbox.source,
        "phases_ms": sandbox.phases,
        "cgroup_parent": sandbox.spec.cgroup_parent,
        "netns": network.netns if network else "",
        "network_check": network_check,
        "machine": dict(facts),
        "interfaces": [
            {"name": nic.name, "mac": nic.mac, "mtu": nic.mtu, "addresses": nic.addresses}
            for nic in (network.interfaces if network else [])
        ],
    }
    return {"info": json.dumps(info)}


def _metadata(name: str, config: cri.PodSandboxConfig) -> SandboxMetadata:
    if not config.HasField("metadata"):
        raise missing(name)
    metadata = config.metadata
    return SandboxMetadata(
        name=required(f"{name}.name", metadata.name),
        uid=required(f"{name}.uid", metadata.uid),
        namespace=required(f"{name}.namespace", metadata.namespace),
        attempt=metadata.attempt,
    )


def _hostname(given: str, pod: str) -> str:
    """Return the host name; clients other than kubelet often give none, and a VM has no host's to inherit."""
    if given:
        return hostname("config.hostname", given)
    return _NOT_IN_HOSTNAME.sub("-", pod.lower())[:63].strip("-") or "localhost"


def _log_directory(value: str) -> str:
    return absolute_path("config.log_directory", value).rstrip("/") or "/" if value else ""


def _dns(name: str, message: cri.DNSConfig) -> Dns:
    return Dns(
        servers=[ip_address(f"{name}.servers[{i}]", server) for i, server in enumerate(message.servers)],
        searches=[resolv_word(f"{name}.searches[{i}]", search) for i, search in enumerate(message.searches)],
        options=[resolv_word(f"{name}.options[{i}]", option) for i, option in enumerate(message.options)],
    )


def _port_mappings(name: str, config: cri.PodSandboxConfig) -> list[PortMapping]:
    if len(config.port_mappings) > LIST_LIMIT:
        raise InvalidArgument(f"{name} has {len(config.port_mappings)} entries; at most {LIST_LIMIT} are allowed")
    mappings = []
    for i, mapping in enumerate(config.port_mappings):
        field = f"{name}[{i}]"
        protocol = _PROTOCOLS.get(mapping.protocol)
        if protocol is None:
            raise bad(f"{field}.protocol", int(mapping.protocol), "is not TCP, UDP or SCTP")
        host_port = number(f"{field}.host_port", mapping.host_port, high=65535)
        container_port = number(f"{field}.container_port", mapping.container_port, high=65535)
        host_ip = ip_address(f"{field}.host_ip", mapping.host_ip) if mapping.host_ip else ""
        if host_port == 0:
            continue  # CRI: nothing is to be published
        if container_port == 0:
            raise missing(f"{field}.container_port")
        mappings.append(
            PortMapping(protocol=protocol, container_port=container_port, host_port=host_port, host_ip=host_ip)
        )
    return mappings


def _cgroup_parent(name: str, value: str) -> str:
    text(name, value, limit=PATH_LIMIT)
    if ".." in value.split("/"):
        raise bad(name, value, "contains '..'")
    if value and not value.startswith("/") and not value.endswith(".slice"):
        raise bad(name, value, "is neither an absolute cgroup path nor a systemd slice")
    return value


def _sysctls(name: str, linux: cri.LinuxPodSandboxConfig) -> dict[str, str]:
    """Any sysctl is the pod's own: its VM has its own kernel. Which ones a pod may set is kubelet's policy."""
    text_map(name, linux.sysctls)
    return {sysctl_name(name, key): value for key, value in linux.sysctls.items()}
