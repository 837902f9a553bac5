"""StartContainer."""

from __future__ import annotations

from vmruntime import tracing
from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import Agent
from vmruntime.errors import Code, FailedPrecondition
from vmruntime.model.container import Container, ContainerState
from vmruntime.pods.context import Context
from vmruntime.pods.spans import note_container
from vmruntime.pods.vm_end import vm_end_told

NOT_FOUND_EXIT_CODE = 127
NOT_EXECUTABLE_EXIT_CODE = 126
START_FAILED_EXIT_CODE = 128
UNDECIDED = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED})
"""Errors that do not say whether the guest did what it was asked."""


async def start_container(context: Context, container_id: str) -> None:
    """Start a created container.

    Raises:
        FailedPrecondition: It is not in state CREATED, or its command cannot be run; in that case it is EXITED with
            exit code 127 (not found), 126 (not executable) or 128.
        AgentGone: The guest does not answer; the container is still CREATED, unless its VM has ended.
    """
    note_container(context, container_id)
    async with context.locks.hold(container_id):
        container = context.registry.container(container_id)
        if container.state is not ContainerState.CREATED:
            raise FailedPrecondition(
                f"the container {container_id} is {container.state.value}; only a created one can be started"
            )
        if container.message:  # its command was found missing when it was created
            raise await record_start_failure(context, container, container.message)
        running = context.running(container.sandbox_id).running
        try:
            async with vm_end_told(running):
                with tracing.span("container.start"):
                    started_at = await _start(running.agent, container_id)
        except AgentError as error:
            if error.code in UNDECIDED:
                raise
            raise await record_start_failure(context, container, error.message) from error
        await context.registry.change_container(container_id, state=ContainerState.RUNNING, started_at=started_at)


async def _start(agent: Agent, container_id: str) -> int:
    """Return when a container was started, now or by an earlier call whose answer got lost."""
    try:
        return await agent.start(container_id)
    except AgentError as error:
        try:
            states = {state.id: state for state in await agent.containers()}
        except AgentError:
            raise error from None
        state = states.get(container_id)
        if state is None or state.started_at == 0:
            raise
        return state.started_at


async def record_start_failure(context: Context, container: Container, message: str) -> FailedPrecondition:
    """Write down that a container ended without having run, and return the error that says so. Call it with its lock held."""
    now = context.clock.now_ns()
    await context.registry.change_container(
        container.id,
        state=ContainerState.EXITED,
        exit_code=start_exit_code(message),
        reason="StartError",
        message=message,
        started_at=now,
        finished_at=now,
        pid=0,
    )
    return FailedPrecondition(f"the container {container.id} could not be started: {message}")


def start_exit_code(message: str) -> int:
    """Return the exit code a shell would give for a command that cannot be run."""
    lowered = message.lower()
    if "not found" in lowered or "no such file" in lowered:
        return NOT_FOUND_EXIT_CODE
    if "permission denied" in lowered or "exec format error" in lowered:
        return NOT_EXECUTABLE_EXIT_CODE
    return START_FAILED_EXIT_CODE
