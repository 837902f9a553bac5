"""What the host asks of a guest agent; proto/agent.proto in Python types."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from vmruntime.model.container import ContainerSpec, ContainerUser
from vmruntime.model.image import DiskImage
from vmruntime.model.output import OutputRecord
from vmruntime.model.resources import VmSize
from vmruntime.model.sandbox import Dns, NetworkInterface, NetworkRoute, UserNamespace
from vmruntime.model.stats import GuestUsage
from vmruntime.model.streams import AttachSpec, ExecEnd, ExecSpec, OutputChunk, TerminalSize

AGENT_PORT = 1024
"""The vsock port of every agent."""

RECORD_LIMIT = 16 * 1024
"""Bytes of one output record."""


class AgentHello(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers.

    Attributes:
        sandbox_id: Empty until set-up.
        uptime_us, started_us: Microseconds since the guest's kernel started: now, and when the agent began.
        user_namespaces: Whether the guest can give containers a user namespace.
    """

    version: str
    kernel: str
    sandbox_id: str
    uptime_us: int
    started_us: int
    user_namespaces: bool = False


class GuestSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a booted guest one pod's sandbox.

    Attributes:
        user: The containers' user namespace; on a host the one that owns the pod's network. None: the agent's.
    """

    sandbox_id: str
    hostname: str
    time_ns: int
    entropy: bytes
    interfaces: list[NetworkInterface]
    routes: list[NetworkRoute]
    dns: Dns
    sysctls: dict[str, str]
    scratch_serial: str
    shared_pid_namespace: bool
    host_ipc: bool = False
    user: UserNamespace | None = None


class PidMode(enum.Enum):
    """Whose processes a container sees."""

    CONTAINER = 0
    POD = 1
    TARGET = 2
    HOST = 3


class GuestMemoryVolume(msgspec.Struct, frozen=True, kw_only=True):
    """A tmpfs of the pod; the first container that names its key makes it. A size of 0: half the guest's memory."""

    key: str
    size: int
    uid: int
    gid: int
    mode: int


class GuestDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device node: the disk with a serial, or the guest's own node of a path; see model.container.Device."""

    path: str
    permissions: str
    serial: str = ""
    source: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    users: bool = False


class GuestMachine(msgspec.Struct, frozen=True, kw_only=True):
    """What the container of an image pod is: a VM image and how its guest is set up.

    Attributes:
        image_id: "sha256:…".
        disk_path: The image's file.
        size: Of the VM, as the limits of pod and container are now.
    """

    spec: ContainerSpec
    image_id: str
    disk: DiskImage
    disk_path: str
    size: VmSize


class GuestContainer(msgspec.Struct, frozen=True, kw_only=True):
    """A container to create.

    Attributes:
        oci_spec: config.json of the OCI runtime specification, as JSON.
        layer_serials: Lowest first; an absolute path names a directory where the layer is mounted.
        user: user[:group] by id or name; empty keeps what the spec says.
        image_groups: Also take the groups the image's /etc/group gives the user.
        share_tag: Tag of the pod's share, when a mount of the spec has a source "share:…".
        memory_volumes: Those that sources "memory:KEY" name.
        image_volumes: Layer serials of each image volume, lowest first; sources name them "image:INDEX".
        machine: Of an image pod, whose agent takes nothing else but id and devices; None: of any other.
    """

    id: str
    oci_spec: bytes = b""
    layer_serials: list[str] = []
    readonly_rootfs: bool = False
    user: str = ""
    groups: list[int] = []
    image_groups: bool = False
    pid_mode: PidMode = PidMode.POD
    pid_target: str = ""
    tty: bool = False
    stdin: bool = False
    stdin_once: bool = False
    share_tag: str = ""
    memory_volumes: list[GuestMemoryVolume] = []
    image_volumes: list[list[str]] = []
    devices: list[GuestDevice] = []
    all_devices: bool = False
    machine: GuestMachine | None = None


class GuestPhase(enum.Enum):
    """How far a container is, in the guest's eyes."""

    CREATED = 0
    RUNNING = 1
    EXITED = 2


class GuestContainerState(msgspec.Struct, frozen=True, kw_only=True):
    """One container in the guest. Times are nanoseconds since the epoch by the guest's clock.

    Attributes:
        message: How it ended, in a sentence, where the exit code does not say enough.
    """

    id: str
    phase: GuestPhase
    pid: int
    started_at: int
    exited_at: int
    exit_code: int
    oom_killed: bool
    message: str = ""


class ExecOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What a command said and how it ended."""

    stdout: bytes
    stderr: bytes
    end: ExecEnd


class OutputReader(Protocol):
    """A container's output from one record on; iterate, then acknowledge what is safe.

    AgentGone while iterating is no end: the output can be read again after the last record that is safe.
    """

    def __aiter__(self) -> AsyncIterator[OutputRecord]:
        """Iterate to the end of an exited container's output."""

    async def acknowledge(self, seq: int) -> None:
        """Tell the agent that everything up to `seq` may be forgotten."""


class ProcessStream(Protocol):
    """A process's streams. Writing never fails: why a stream has ended is told by output()."""

    def output(self) -> AsyncIterator[OutputChunk]:
        """Iterate over what it writes, to the end. An empty chunk says that it runs, or is joined, now."""

    async def write(self, data: bytes) -> None:
        """Send input; waits while the process takes none."""

    async def close_input(self) -> None:
        """End the input."""

    async def resize(self, size: TerminalSize) -> None:
        """Set the size of its terminal; without one: nothing."""


class ExecStream(ProcessStream, Protocol):
    """A command that runs."""

    @property
    def end(self) -> ExecEnd:
        """How it ended; known when output() is at its end."""


class AttachStream(ProcessStream, Protocol):
    """A container somebody has joined."""

    too_slow: bool
    """Set at the end of output() when the agent let go of this reader because it did not read."""


class PortStream(Protocol):
    """A TCP connection to a port of a sandbox."""

    def read(self) -> AsyncIterator[bytes]:
        """Iterate over what the port sends, to its end; raises AgentError ABORTED when the connection breaks."""

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the port takes none."""

    async def close_write(self) -> None:
        """Say that no more bytes come."""


class PortDialer(Protocol):
    """The way to a sandbox's ports."""

    def connect(self, port: int) -> AbstractAsyncContextManager[PortStream]:
        """Connect to a port on loopback; raises AgentError FAILED_PRECONDITION when nobody listens."""


class Agent(Protocol):
    """A connected agent. Every method raises AgentError (with the agent's code), AgentGone or AgentLied."""

    async def hello(self) -> AgentHello:
        """Ask who answers."""

    async def setup(self, setup: GuestSetup) -> None:
        """Turn the guest into a pod's sandbox."""

    async def prepare(self, entropy: bytes, scratch_serial: str, oci_spec: bytes) -> None:
        """Do ahead what setup() and the first create() would have to wait for, in a VM that is kept ready for a pod.

        Args:
            entropy: Bytes nobody else has; setup() is to bring others.
            scratch_serial: Of the writable disk; empty: it is not there yet.
            oci_spec: A configuration as containers usually have it: one is run that does nothing. Empty: none.
        """

    async def create(self, container: GuestContainer) -> tuple[int, ContainerUser]:
        """Create a container; return its pid in the guest and the user it resolved."""

    async def start(self, container_id: str) -> int:
        """Start a container; return when, in nanoseconds since the epoch."""

    async def signal(self, container_id: str, signal: int, *, everyone: bool = False) -> None:
        """Signal the container's first process, or every process."""

    async def delete(self, container_id: str) -> list[str]:
        """Kill and remove a container; return the serials of layer disks that nothing uses any more."""

    async def containers(self) -> list[GuestContainerState]:
        """Return every container the agent knows."""

    def events(self) -> AsyncIterator[GuestContainerState]:
        """Iterate over every container's state, then over changes."""

    def output(self, container_id: str, after_seq: int) -> AbstractAsyncContextManager[OutputReader]:
        """Read a container's output after record `after_seq`."""

    async def exec_sync(self, container_id: str, argv: list[str], timeout: float, limit: int) -> ExecOutput:
        """Run a command to its end; `limit` bytes of each output are kept; timeout 0: none."""

    def exec(self, spec: ExecSpec) -> AbstractAsyncContextManager[ExecStream]:
        """Run a command; leaving the block before its end kills it."""

    def attach(self, spec: AttachSpec) -> AbstractAsyncContextManager[AttachStream]:
        """Join a container's streams from now on; leaving the block leaves it running."""

    def ports(self) -> AbstractAsyncContextManager[PortDialer]:
        """Open the way to the sandbox's ports."""

    async def stats(self, container_ids: list[str]) -> GuestUsage:
        """Return what the sandbox and these containers use, without those it does not know; no ids: all containers."""

    async def update(self, container_id: str, resources: bytes) -> None:
        """Change a container's limits to linux.resources of the OCI specification, as JSON; what is left out stays."""

    async def online_cpus(self, count: int) -> None:
        """Wait until the guest uses so many processors."""

    async def shutdown(self, grace: float) -> None:
        """Ask the guest to stop its containers within `grace` seconds and power off."""

    async def close(self) -> None:
        """Disconnect."""
