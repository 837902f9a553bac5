"""What pods offer to the CRI services and the command line."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from vmruntime.agent.interface import AttachStream, ExecStream, PortDialer
from vmruntime.model.container import Container, ContainerSpec
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import Sandbox, SandboxSpec
from vmruntime.model.stats import ContainerUsage, SandboxUsage
from vmruntime.model.streams import AttachSpec, ExecSpec


class PodEventKind(enum.Enum):
    """CRI's ContainerEventType; a sandbox is told of under its own id, like a container."""

    CREATED = 0
    STARTED = 1
    STOPPED = 2
    DELETED = 3


class PodEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A change, with the picture right after it.

    Attributes:
        id: The container, or the sandbox itself.
        time: Nanoseconds since the epoch.
        sandbox: None once it is removed.
        containers: All containers of the sandbox.
    """

    kind: PodEventKind
    id: str
    time: int
    sandbox: Sandbox | None
    containers: list[Container]


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a command said; each output is cut at 16 MiB, as CRI has it."""

    stdout: bytes
    stderr: bytes
    exit_code: int


class Pods(Protocol):
    """Use cases on pods. Every method may raise any vmruntime.errors class; ids are full ids.

    Lists and getters answer from memory and show neither sandboxes being created nor containers being created.
    """

    async def run_sandbox(self, spec: SandboxSpec) -> str:
        """Start a sandbox and return its id once it is ready.

        Raises:
            AlreadyExists: A sandbox of that name exists (a retry of a call still under way, or one whose caller
                went away, is handed the same sandbox instead).
        """

    async def stop_sandbox(self, sandbox_id: str) -> None:
        """Stop a sandbox and its containers and release its network; unknown or stopped: success."""

    async def remove_sandbox(self, sandbox_id: str) -> None:
        """Stop and forget a sandbox with its containers; unknown: success."""

    def sandbox(self, sandbox_id: str) -> Sandbox:
        """Return one sandbox.

        Raises:
            NotFound: No such id.
        """

    def sandboxes(self) -> list[Sandbox]:
        """Return all sandboxes that CRI shows."""

    def facts(self, sandbox_id: str) -> dict[str, str | int | bool]:
        """Return what people may want to know of a running sandbox; one that does not run: nothing."""

    async def check_network(self, sandbox_id: str) -> str:
        """Return in words how a sandbox's network is, by CNI's CHECK."""

    async def create_container(self, sandbox_id: str, spec: ContainerSpec) -> str:
        """Prepare a container in a ready sandbox and return its id."""

    async def start_container(self, container_id: str) -> None:
        """Start a created container.

        Raises:
            FailedPrecondition: It is not in state CREATED.
        """

    async def stop_container(self, container_id: str, timeout: float) -> None:
        """Send the stop signal, then after `timeout` seconds SIGKILL; unknown or exited: success."""

    async def remove_container(self, container_id: str) -> None:
        """Kill and forget a container; unknown: success."""

    def container(self, container_id: str) -> Container:
        """Return one container.

        Raises:
            NotFound: No such id.
        """

    def containers(self) -> list[Container]:
        """Return all containers that CRI shows."""

    async def exec_sync(self, container_id: str, argv: list[str], timeout: float) -> ExecResult:
        """Run a command in a running container; timeout in seconds, 0 for none.

        Raises:
            DeadlineExceeded: It was killed because its time was up.
        """

    def exec(self, spec: ExecSpec) -> AbstractAsyncContextManager[ExecStream]:
        """Run a command with its streams; leaving the block before its end kills it.

        Raises:
            FailedPrecondition: The container is not running.
        """

    def attach(self, spec: AttachSpec) -> AbstractAsyncContextManager[AttachStream]:
        """Join a container's streams from now on; leaving the block leaves it running.

        Raises:
            FailedPrecondition: The container is neither created nor running.
        """

    def ports(self, sandbox_id: str) -> AbstractAsyncContextManager[PortDialer]:
        """Open the way to the ports on a sandbox's loopback.

        Raises:
            FailedPrecondition: The sandbox is not running.
        """

    async def reopen_log(self, container_id: str) -> None:
        """Close the log file and open its path again, after a rotation.

        Raises:
            FailedPrecondition: The container is not running.
        """

    async def usage(self, container_ids: list[str]) -> list[ContainerUsage]:
        """Return what these running containers use; without those that ended meanwhile or whose sandbox does not answer."""

    async def sandbox_usage(self, sandbox_ids: list[str]) -> list[SandboxUsage]:
        """Return what these ready sandboxes use; those that ended meanwhile are left out."""

    async def update_container(self, container_id: str, resources: LinuxResources) -> None:
        """Change the limits of a created or running container; what is left out stays.

        Raises:
            FailedPrecondition: It has exited.
        """

    async def update_sandbox(
        self, sandbox_id: str, overhead: LinuxResources | None, resources: LinuxResources | None
    ) -> None:
        """Change what a ready pod may have in all; None leaves one as it is."""

    def events(self) -> AsyncIterator[PodEvent]:
        """Iterate over changes from now on; a reader that falls far behind gets Aborted."""
