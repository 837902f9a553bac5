"""What a pod sandbox is: what was asked for, and what became of it."""

from __future__ import annotations

import enum

import msgspec

from vmruntime.model.image_pod import ImagePod
from vmruntime.model.resources import LinuxResources


class SandboxKind(enum.Enum):
    """What boots for a pod."""

    CONTAINER = "container"
    IMAGE = "image"
    HOST = "host"


class SandboxState(enum.Enum):
    """The life of a sandbox; see model/lifecycle.py for the allowed steps.

    CREATING and REMOVING are never shown by CRI lists; they tell a restarted daemon what to undo or finish.
    """

    CREATING = "creating"
    READY = "ready"
    NOTREADY = "notready"
    REMOVING = "removing"


class NamespaceMode(enum.Enum):
    """Whose namespace a process uses; CRI's NamespaceMode."""

    POD = 0
    CONTAINER = 1
    NODE = 2
    TARGET = 3


class IdMapping(msgspec.Struct, frozen=True, kw_only=True):
    """CRI's IDMapping: ids from `container_id` on inside are ids from `host_id` on outside, `length` of them."""

    container_id: int
    host_id: int
    length: int

    def outside(self, inside: int) -> int | None:
        """Return an id as it is outside; None: it is not mapped."""
        offset = inside - self.container_id
        return self.host_id + offset if 0 <= offset < self.length else None

    def __str__(self) -> str:
        return f"{self.container_id} {self.host_id} {self.length}"


class UserNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """Which ids the processes of a pod, or the files of a mount, have, and what these are outside."""

    uids: IdMapping
    gids: IdMapping

    def __str__(self) -> str:
        return f"uids {self.uids}, gids {self.gids}"


class Namespaces(msgspec.Struct, frozen=True, kw_only=True):
    """CRI's NamespaceOption.

    Attributes:
        user_namespace: The pod's; None: the node's, or the guest's.
    """

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    user_namespace: UserNamespace | None = None


class SandboxMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The name kubelet gives a sandbox; unique among sandboxes."""

    name: str
    uid: str
    namespace: str
    attempt: int = 0

    @property
    def key(self) -> str:
        """The name as one string, for the uniqueness rule."""
        return f"{self.name}_{self.namespace}_{self.uid}_{self.attempt}"


class Dns(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of resolv.conf(5)."""

    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []


class PortMapping(msgspec.Struct, frozen=True, kw_only=True):
    """A host port that leads to a port of the pod, for the CNI portmap plugin."""

    protocol: str
    container_port: int
    host_port: int
    host_ip: str = ""


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a pod's traffic in bits per second, to the pod and from it; 0: none."""

    ingress: int = 0
    egress: int = 0


class SandboxSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What RunPodSandbox asked for.

    Attributes:
        kind: What to boot; chosen from annotation, runtime handler or default.
        runtime_handler: The handler as given, reported back unchanged.
        log_directory: Host directory under which container log paths lie; empty: none.
        sysctls: Pod-level sysctls, dotted names.
        overhead: RuntimeClass overhead, for the size of the VM.
        resources: Sum of the containers' resources, for the size of the VM.
        image_pod: What the annotations of an image pod ask for; None: another kind of pod.
    """

    metadata: SandboxMetadata
    kind: SandboxKind = SandboxKind.CONTAINER
    runtime_handler: str = ""
    hostname: str = ""
    log_directory: str = ""
    dns: Dns = Dns()
    port_mappings: list[PortMapping] = []
    bandwidth: Bandwidth = Bandwidth()
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    cgroup_parent: str = ""
    sysctls: dict[str, str] = {}
    namespaces: Namespaces = Namespaces()
    privileged: bool = False
    overhead: LinuxResources | None = None
    resources: LinuxResources | None = None
    image_pod: ImagePod | None = None


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """A permanent entry of the neighbour table: what answers no ARP or neighbour discovery."""

    address: str
    mac: str


class NetworkInterface(msgspec.Struct, frozen=True, kw_only=True):
    """One interface of a pod as CNI made it.

    Attributes:
        name: Name in the pod, e.g. eth0.
        mac: aa:bb:cc:dd:ee:ff; the guest's NIC has the same.
        device_mac: What its NIC was plugged in with before CNI had chosen `mac`; empty: the same.
        mtu: Bytes.
        addresses: CIDR form, IPv4 and IPv6.
        tap: Name of the tap beside the interface in the pod's network namespace.
        neighbours: Permanent ones.
    """

    name: str
    mac: str
    mtu: int
    addresses: list[str]
    tap: str
    neighbours: list[Neighbour] = []
    device_mac: str = ""


class NetworkRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A route of the pod.

    Attributes:
        gateway: Empty: on-link.
        metric: 0: the kernel's default.
        mtu: 0: the interface's.
        source: Preferred source address; empty: the kernel chooses.
    """

    destination: str
    gateway: str = ""
    interface: str = ""
    metric: int = 0
    mtu: int = 0
    source: str = ""


class PodNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """What CNI gave a pod, ready for the guest.

    Attributes:
        netns: Path of the pod's network namespace.
        dns: Servers the CNI result names, used when CRI gives none.
    """

    netns: str
    interfaces: list[NetworkInterface] = []
    routes: list[NetworkRoute] = []
    dns: Dns = Dns()

    @property
    def ips(self) -> list[str]:
        """Addresses without prefix length, in CNI's order; the first is the pod's primary IP."""
        return [address.split("/", 1)[0] for nic in self.interfaces for address in nic.addresses]


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox as the store keeps it.

    Attributes:
        created_at: Nanoseconds since the epoch.
        reason: Why it is not ready, in one sentence; empty while ready.
        network: None until CNI answered, and for host-network pods.
        kernel: Release of the guest's kernel, once it answered.
        phases: Milliseconds each step of the start took, in order.
        source: Where its guest came from: cold, template or warm; empty for other kinds than container pods.
    """

    id: str
    spec: SandboxSpec
    state: SandboxState
    created_at: int
    reason: str = ""
    network: PodNetwork | None = None
    kernel: str = ""
    phases: dict[str, float] = {}
    source: str = ""
