"""All use cases behind one interface; implements pods.interface.Pods."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from vmruntime.agent.interface import AttachStream, ExecStream, PortDialer
from vmruntime.errors import FailedPrecondition
from vmruntime.model.container import Container, ContainerSpec, ContainerState
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import Sandbox, SandboxSpec
from vmruntime.model.stats import ContainerUsage, SandboxUsage
from vmruntime.model.streams import AttachSpec, ExecSpec
from vmruntime.pods.container_create import create_container
from vmruntime.pods.container_remove import remove_container
from vmruntime.pods.container_start import start_container
from vmruntime.pods.container_stop import stop_container
from vmruntime.pods.context import Context
from vmruntime.pods.exec_sync import exec_sync
from vmruntime.pods.interface import ExecResult, PodEvent
from vmruntime.pods.network_care import check_network
from vmruntime.pods.resize import update_container, update_sandbox
from vmruntime.pods.sandbox_run import run_sandbox
from vmruntime.pods.sandbox_stop import remove_sandbox, stop_sandbox
from vmruntime.pods.spans import note_container, note_sandbox
from vmruntime.pods.streams import attach_stream, exec_stream, sandbox_ports
from vmruntime.pods.usage import container_usage, sandbox_usage


class PodService:
    """The pods of one daemon."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def run_sandbox(self, spec: SandboxSpec) -> str:
        """Start a sandbox; see pods/sandbox_run.py."""
        return await run_sandbox(self._context, spec)

    async def stop_sandbox(self, sandbox_id: str) -> None:
        """Stop a sandbox; see pods/sandbox_stop.py."""
        await stop_sandbox(self._context, sandbox_id)

    async def remove_sandbox(self, sandbox_id: str) -> None:
        """Stop and forget a sandbox; see pods/sandbox_stop.py."""
        await remove_sandbox(self._context, sandbox_id)

    def sandbox(self, sandbox_id: str) -> Sandbox:
        """Return one sandbox or raise NotFound."""
        return self._context.registry.sandbox(sandbox_id)

    def sandboxes(self) -> list[Sandbox]:
        """Return the sandboxes CRI shows."""
        return self._context.registry.sandboxes()

    def facts(self, sandbox_id: str) -> dict[str, str | int | bool]:
        """Return what a running sandbox says of itself."""
        live = self._context.live.get(sandbox_id)
        return live.running.facts() if live is not None else {}

    async def check_network(self, sandbox_id: str) -> str:
        """Look at a sandbox's network; see pods/network_care.py."""
        return await check_network(self._context, sandbox_id)

    async def create_container(self, sandbox_id: str, spec: ContainerSpec) -> str:
        """Prepare a container; see pods/container_create.py."""
        return await create_container(self._context, sandbox_id, spec)

    async def start_container(self, container_id: str) -> None:
        """Start a container; see pods/container_start.py."""
        await start_container(self._context, container_id)

    async def stop_container(self, container_id: str, timeout: float) -> None:
        """Stop a container; see pods/container_stop.py."""
        note_container(self._context, container_id)
        await stop_container(self._context, container_id, timeout)

    async def remove_container(self, container_id: str) -> None:
        """Kill and forget a container; see pods/container_remove.py."""
        await remove_container(self._context, container_id)

    def container(self, container_id: str) -> Container:
        """Return one container or raise NotFound."""
        return self._context.registry.container(container_id)

    def containers(self) -> list[Container]:
        """Return the containers CRI shows."""
        return self._context.registry.containers()

    async def exec_sync(self, container_id: str, argv: list[str], timeout: float) -> ExecResult:
        """Run a command; see pods/exec_sync.py."""
        note_container(self._context, container_id)
        return await exec_sync(self._context, container_id, argv, timeout)

    def exec(self, spec: ExecSpec) -> AbstractAsyncContextManager[ExecStream]:
        """Run a command with its streams; see pods/streams.py."""
        return exec_stream(self._context, spec)

    def attach(self, spec: AttachSpec) -> AbstractAsyncContextManager[AttachStream]:
        """Join a container's streams; see pods/streams.py."""
        return attach_stream(self._context, spec)

    def ports(self, sandbox_id: str) -> AbstractAsyncContextManager[PortDialer]:
        """Open the way to a sandbox's ports; see pods/streams.py."""
        return sandbox_ports(self._context, sandbox_id)

    async def reopen_log(self, container_id: str) -> None:
        """Open a running container's log path again."""
        container = self.container(container_id)
        live = self._context.live.get(container.sandbox_id)
        pump = live.pumps.get(container_id) if live else None
        if container.state is not ContainerState.RUNNING or pump is None:
            raise FailedPrecondition(f"the container {container_id} is {container.state.value}, not running")
        await pump.reopen()

    async def usage(self, container_ids: list[str]) -> list[ContainerUsage]:
        """Return what running containers use; see pods/usage.py."""
        return await container_usage(self._context, container_ids)

    async def sandbox_usage(self, sandbox_ids: list[str]) -> list[SandboxUsage]:
        """Return what ready sandboxes use; see pods/usage.py."""
        return await sandbox_usage(self._context, sandbox_ids)

    async def update_container(self, container_id: str, resources: LinuxResources) -> None:
        """Change a container's limits; see pods/resize.py."""
        note_container(self._context, container_id)
        await update_container(self._context, container_id, resources)

    async def update_sandbox(
        self, sandbox_id: str, overhead: LinuxResources | None, resources: LinuxResources | None
    ) -> None:
        """Change a pod's size; see pods/resize.py."""
        note_sandbox(self._context, sandbox_id)
        await update_sandbox(self._context, sandbox_id, overhead, resources)

    def events(self) -> AsyncIterator[PodEvent]:
        """Iterate over changes from now on."""
        return self._context.registry.events()
