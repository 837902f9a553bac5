"""From the options of `vmruntime run` to the two CRI configurations kubelet would send."""

from __future__ import annotations

import dataclasses
import re
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmruntime.cli.vmspec import VmOptions
from vmruntime.errors import InvalidArgument
from vmruntime.generated import cri_pb2
from vmruntime.images.endpoint import redacted
from vmruntime.images.url_names import is_url

KIND_ANNOTATION = "vmruntime.io/kind"
CREATOR_ANNOTATION = "vmruntime.io/created-by"
CREATOR = "vmruntime-run"
NAMESPACE = "default"

CPU_PERIOD = 100_000  # microseconds; kubelet's
_SHARES_PER_CPU = 1024
_DISK_SUFFIX = re.compile(r"\.(?:qcow2|raw|img|vmdk)$", re.IGNORECASE)

# What every Kubernetes container is kept from seeing and from writing unless it is privileged.
MASKED_PATHS = (
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
)  # fmt: skip
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the user asked for.

    Attributes:
        command: Replaces the image's default arguments; empty: the image's.
        entrypoint: Replaces the image's entry point; empty: the image's.
        memory: Bytes, 0 for no limit.
        cpus: CPUs, 0 for no limit.
        stdin, tty: Whether it has a standard input, open until the first client's ends, and a terminal.
        user: A security context that sets just the user.
        vm: How the VM is that the image is of; None: it is of a container.
    """

    image: str
    command: Sequence[str] = ()
    entrypoint: str = ""
    name: str = ""
    hostname: str = ""
    kind: str = ""
    env: Sequence[tuple[str, str]] = ()
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    memory: int = 0
    cpus: float = 0.0
    ports: Sequence[cri_pb2.PortMapping] = ()
    user: cri_pb2.LinuxContainerSecurityContext | None = None
    workdir: str = ""
    stdin: bool = False
    tty: bool = False
    dns: cri_pb2.DNSConfig | None = None
    vm: VmOptions | None = None


def pod_config(
    options: RunOptions, logs: Path, *, suffix: Callable[[], str] = lambda: secrets.token_hex(3)
) -> cri_pb2.PodSandboxConfig:
    """Return the pod's configuration; its logs go to a directory of its own under `logs`.

    Raises:
        InvalidArgument: The name or hostname is not one that Kubernetes allows, or a file of the VM's holds nonsense.
        NotFound: There is no such file.
    """
    name = options.name or f"{base_name(options.image)[:50]}-{suffix()}"
    _check_label("--name", name)
    hostname = options.hostname or name
    _check_label("--hostname", hostname)
    metadata = cri_pb2.PodSandboxMetadata(name=name, uid=str(uuid.uuid4()), namespace=NAMESPACE)
    described = options.vm.annotations() if options.vm is not None else {}
    annotations = {**described, **options.annotations, CREATOR_ANNOTATION: CREATOR}
    if options.kind:
        annotations[KIND_ANNOTATION] = options.kind
    return cri_pb2.PodSandboxConfig(
        metadata=metadata,
        hostname=hostname,
        log_directory=str(logs / log_directory_name(metadata)),
        dns_config=options.dns,
        port_mappings=options.ports,
        labels=options.labels,
        annotations=annotations,
        # The daemon sizes the VM by the sum over the pod's containers, of which there is one.
        linux=cri_pb2.LinuxPodSandboxConfig(resources=_resources(options)),
    )


def container_config(options: RunOptions, image_ref: str) -> cri_pb2.ContainerConfig:
    """Return the configuration of the pod's one container, which runs the image `image_ref`."""
    name = base_name(options.image)
    # A VM's own kernel and init system have the guest to themselves.
    security = cri_pb2.LinuxContainerSecurityContext()
    if options.vm is None:
        security.masked_paths.extend(MASKED_PATHS)
        security.readonly_paths.extend(READONLY_PATHS)
    if options.user is not None:
        security.MergeFrom(options.user)
    return cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=name),
        image=cri_pb2.ImageSpec(image=image_ref, user_specified_image=redacted(options.image)),
        command=[options.entrypoint] if options.entrypoint else [],
        args=options.command,
        working_dir=options.workdir,
        envs=[cri_pb2.KeyValue(key=key, value=value.encode()) for key, value in options.env],
        labels=options.labels,
        annotations={CREATOR_ANNOTATION: CREATOR},
        log_path=f"{name}.log",
        # A VM's console is a terminal, and people come and go.
        stdin=options.stdin or options.vm is not None,
        stdin_once=options.stdin and options.vm is None,
        tty=options.tty or options.vm is not None,
        linux=cri_pb2.LinuxContainerConfig(resources=_resources(options), security_context=security),
    )


def log_directory_name(metadata: cri_pb2.PodSandboxMetadata) -> str:
    """Return the name of a pod's log directory, after kubelet's pattern."""
    return f"{metadata.namespace}_{metadata.name}_{metadata.uid}"


def base_name(reference: str) -> str:
    """Return a container's name after its image: the last part of the reference, made a DNS label."""
    if is_url(reference):
        reference = _DISK_SUFFIX.sub("", unquote(urlsplit(reference).path))
    last = reference.split("@", 1)[0].rstrip("/").rsplit("/", 1)[-1].split(":", 1)[0]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:63].rstrip("-") or "container"


def _resources(options: RunOptions) -> cri_pb2.LinuxContainerResources:
    resources = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=options.memory)
    if options.cpus:
        resources.cpu_period = CPU_PERIOD
        resources.cpu_quota = round(options.cpus * CPU_PERIOD)
        resources.cpu_shares = max(2, round(options.cpus * _SHARES_PER_CPU))
    return resources


def _check_label(option: str, value: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        raise InvalidArgument.field(
            option, value, "is not a DNS label", remedy="use at most 63 of a-z, 0-9 and -, none of - at the ends"
        )
