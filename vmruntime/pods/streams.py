"""Exec, attach and port-forward: a process's streams or a TCP connection, whatever carries them to the client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from vmruntime.agent.interface import Agent, AttachStream, ExecStream, PortDialer
from vmruntime.errors import FailedPrecondition
from vmruntime.model.container import ContainerState
from vmruntime.model.streams import AttachSpec, ExecSpec
from vmruntime.pods.context import Context
from vmruntime.pods.vm_end import check_not_held

ATTACHABLE = frozenset({ContainerState.CREATED, ContainerState.RUNNING})


def agent_of_running(context: Context, container_id: str) -> Agent:
    """Return the agent of a running container.

    Raises:
        NotFound: No such container.
        FailedPrecondition: It is not running.
        VmHeld: Its guest does not run for the time being.
    """
    return _agent(context, container_id, frozenset({ContainerState.RUNNING}))


@contextlib.asynccontextmanager
async def exec_stream(context: Context, spec: ExecSpec) -> AsyncIterator[ExecStream]:
    """Run a command in a running container; leaving the block before its end kills it."""
    async with agent_of_running(context, spec.container_id).exec(spec) as stream:
        yield stream


@contextlib.asynccontextmanager
async def attach_stream(context: Context, spec: AttachSpec) -> AsyncIterator[AttachStream]:
    """Join a container that is created or running; before its start, so that nothing it says is missed."""
    async with _agent(context, spec.container_id, ATTACHABLE).attach(spec) as stream:
        yield stream


@contextlib.asynccontextmanager
async def sandbox_ports(context: Context, sandbox_id: str) -> AsyncIterator[PortDialer]:
    """Open the way to a running sandbox's ports."""
    running = context.running(sandbox_id).running
    check_not_held(running)
    async with running.agent.ports() as ports:
        yield ports


def _agent(context: Context, container_id: str, states: frozenset[ContainerState]) -> Agent:
    container = context.registry.container(container_id)
    if container.state not in states:
        raise FailedPrecondition(f"the container {container_id} is {container.state.value}, not running")
    running = context.running(container.sandbox_id).running
    check_not_held(running)
    return running.agent
