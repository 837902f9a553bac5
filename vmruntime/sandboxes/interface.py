"""A place to run containers, whatever it is made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from vmruntime.agent.interface import Agent, AgentHello, GuestDevice, GuestMemoryVolume
from vmruntime.model.container import Device, Mount
from vmruntime.model.resources import LinuxResources, VmSize
from vmruntime.model.sandbox import NetworkInterface, Sandbox
from vmruntime.model.stats import HostUsage


class LayerDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A layer as a disk image and the serial a guest finds it by."""

    path: Path
    serial: str


class VolumeSource(msgspec.Struct, frozen=True, kw_only=True):
    """A mount as the OCI runtime in the sandbox is told of it.

    Attributes:
        mount: What CRI asked for.
        source: A path in the sandbox, or a name the agent turns into one (see agent.proto).
        readonly: Whether the bind itself is to be read-only.
        propagation: private, rslave or rshared.
    """

    mount: Mount
    source: str
    readonly: bool
    propagation: str = "private"


RecordSerials = Callable[[list[str]], Awaitable[None]]


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """A container's volumes, visible in the sandbox.

    Attributes:
        sources: One for each mount but image volumes, in the order of the mounts.
        share_tag, memory: What the agent must be told; see agent.interface.GuestContainer.
    """

    sources: list[VolumeSource] = []
    share_tag: str = ""
    memory: list[GuestMemoryVolume] = []


def guest_device(device: Device, serial: str = "") -> GuestDevice:
    """Return a device as the agent is told of it: the disk with a serial, else the node of the same path as on the host."""
    return GuestDevice(
        path=device.container_path,
        permissions=device.permissions,
        serial=serial,
        source="" if serial else device.host_path,
        type="" if serial else device.type,
        major=device.major,
        minor=device.minor,
        mode=device.mode,
        uid=device.uid,
        gid=device.gid,
        users=device.users,
    )


class RunningSandbox(Protocol):
    """A sandbox whose agent answers."""

    @property
    def agent(self) -> Agent:
        """The agent in the sandbox."""

    @property
    def hello(self) -> AgentHello:
        """What the agent said of itself when it was first reached."""

    @property
    def scratch_serial(self) -> str:
        """Serial of the writable disk."""

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds each step of the start took."""

    @property
    def source(self) -> str:
        """Where its guest came from: cold, template or warm; empty: it has none, or an earlier daemon's."""

    def facts(self) -> dict[str, str | int | bool]:
        """Return what people may want to know of it now, by name; nothing that a caller decides by."""

    def layer_name(self, serial: str) -> str:
        """Return how the agent is told of a layer that attach_layers() made visible."""

    async def attach_nic(self, nic: NetworkInterface, tap_fd: int) -> None:
        """Give the sandbox a NIC."""

    async def attach_layers(self, layers: Sequence[LayerDisk]) -> None:
        """Make layers visible in the sandbox; those that are there already are left alone."""

    async def release_layers(self, serials: Sequence[str]) -> None:
        """Take away layers that no container has any more; one that is not there: success."""

    async def publish_volumes(self, container_id: str, mounts: Sequence[Mount]) -> Published:
        """Make a container's mounts visible in the sandbox; image volumes are left out. On failure nothing stays."""

    async def withdraw_volumes(self, container_id: str) -> None:
        """Take away what publish_volumes() made, once the container is gone; unknown: success."""

    async def attach_devices(self, devices: Sequence[Device], record: RecordSerials) -> list[GuestDevice]:
        """Make host devices usable in the sandbox.

        Args:
            devices: Of one container.
            record: Is told the serials of its disks before one of them is plugged in.

        Raises:
            InvalidArgument: A device cannot be used, or not written to while another container has it read-only.
        """

    async def release_devices(self, unused: Callable[[], Sequence[str]]) -> None:
        """Take away disks of devices by their serials, which are asked for when no other call can attach them."""

    async def resize(self, size: VmSize) -> None:
        """Make the sandbox so large, as far as that means something to it."""

    @property
    def held(self) -> str:
        """Why nothing runs in the sandbox for the time being, in one sentence; empty: it runs."""

    async def wait(self) -> str:
        """Wait for the sandbox's end and return why, in one sentence."""

    async def shut_down(self, grace: float) -> None:
        """Ask the guest to power off within `grace` seconds, then end it."""

    async def close(self) -> None:
        """Let go without ending it."""


class SandboxBackend(Protocol):
    """Makes one kind of sandbox."""

    async def start(self, sandbox: Sandbox) -> RunningSandbox:
        """Start a sandbox; returns when its agent answers. On failure everything it made is released."""

    async def adopt(self, sandbox: Sandbox) -> RunningSandbox:
        """Take over a sandbox of an earlier daemon.

        Raises:
            VmGone: It does not run any more.
        """

    async def release(self, sandbox_id: str, *, final: bool) -> None:
        """End the sandbox and release what it owns; without `final` its console stays readable."""

    def size(self, sandbox: Sandbox, containers: Sequence[LinuxResources] = ()) -> VmSize:
        """Return the size that the sandbox's VM needs with these containers' limits.

        Raises:
            InvalidArgument: This host could never hold it.
        """

    async def usage(self, sandbox: Sandbox) -> HostUsage:
        """Return what the sandbox uses on the host, its VM and helpers included."""
