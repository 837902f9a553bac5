"""StopContainer: the stop signal, a grace period, then SIGKILL."""

from __future__ import annotations

import asyncio
import signal

import structlog

from vmruntime import tracing
from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import Agent
from vmruntime.errors import DeadlineExceeded, NotFound
from vmruntime.model.container import Container, ContainerState
from vmruntime.pods.container_start import record_start_failure
from vmruntime.pods.context import Context

log = structlog.get_logger(__name__)

KILL_SECONDS = 30.0
STOPPABLE = frozenset({ContainerState.CREATED, ContainerState.RUNNING, ContainerState.UNKNOWN})


async def stop_container(context: Context, container_id: str, timeout: float) -> None:
    """Stop a container; unknown or exited: success.

    Raises:
        DeadlineExceeded: It did not end even by SIGKILL.
    """
    try:
        container = context.registry.container(container_id)
    except NotFound:
        return
    if container.state not in STOPPABLE:
        return
    live = context.live.get(container.sandbox_id)
    if live is None:
        return  # its VM is gone or going; the monitor or the stop records the end
    if container.state is ContainerState.CREATED and container.message:
        await _stop_unmade(context, container_id)
        return
    agent = live.running.agent
    try:
        await _stop(context, agent, container, timeout)
    except AgentError as error:
        log.warning("agent could not stop a container", container=container_id, error=str(error))
        raise


async def _stop_unmade(context: Context, container_id: str) -> None:
    """Stop a container whose command was found missing: the guest has none of that name."""
    async with context.locks.hold(container_id):
        container = context.registry.container(container_id)
        if container.state is ContainerState.CREATED:
            await record_start_failure(context, container, container.message)


async def _stop(context: Context, agent: Agent, container: Container, timeout: float) -> None:
    if container.state is ContainerState.RUNNING and timeout > 0:
        with tracing.span("container.grace", {"vmruntime.signal": container.stop_signal}):
            await agent.signal(container.id, container.stop_signal)
            if await _ended_within(context, container.id, timeout):
                return
    with tracing.span("container.kill"):
        await _kill(context, agent, container)


async def _kill(context: Context, agent: Agent, container: Container) -> None:
    await agent.signal(container.id, signal.SIGKILL, everyone=True)
    if not await _ended_within(context, container.id, KILL_SECONDS):
        raise DeadlineExceeded(f"the container {container.id} did not end within {KILL_SECONDS:g} s of SIGKILL")


async def _ended_within(context: Context, container_id: str, timeout: float) -> bool:
    try:
        async with asyncio.timeout(timeout):
            await context.registry.wait_ended(container_id)
    except TimeoutError:
        return False
    return True
