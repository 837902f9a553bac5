"""StopPodSandbox and RemovePodSandbox."""

from __future__ import annotations

import asyncio

import structlog

from vmruntime import tracing
from vmruntime.errors import NotFound, VmruntimeError
from vmruntime.model.container import Container, ContainerState
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.sandbox import SandboxState
from vmruntime.pods.container_remove import forget_container
from vmruntime.pods.container_stop import stop_container
from vmruntime.pods.context import Context
from vmruntime.pods.monitor import end_containers
from vmruntime.pods.spans import note_sandbox

log = structlog.get_logger(__name__)

CONTAINER_GRACE = 2.0
CONTAINER_SLACK = 10.0
"""What killed containers may take besides; a guest that does not answer must not hold up the end of its VM."""

GUEST_GRACE = 5.0


async def stop_sandbox(context: Context, sandbox_id: str) -> None:
    """Stop a sandbox: containers, CNI DEL, VM, disks; unknown or stopped: success."""
    note_sandbox(context, sandbox_id)
    await context.shared.run(lambda: _stop(context, sandbox_id), f"stop {sandbox_id[:13]}")


async def remove_sandbox(context: Context, sandbox_id: str) -> None:
    """Stop a sandbox and forget it with its containers; unknown: success."""
    note_sandbox(context, sandbox_id)
    await context.shared.run(lambda: _remove(context, sandbox_id), f"remove {sandbox_id[:13]}")


async def _stop(context: Context, sandbox_id: str) -> None:
    try:
        context.registry.sandbox(sandbox_id)
    except NotFound:
        return
    # kubelet has stopped the containers by now; what still runs gets a short grace of its own.
    with tracing.span("sandbox.containers"):
        await _stop_containers(context, sandbox_id)
    async with context.locks.hold(sandbox_id):
        await _stop_locked(context, sandbox_id)


async def _stop_containers(context: Context, sandbox_id: str) -> None:
    try:
        async with asyncio.timeout(CONTAINER_GRACE + CONTAINER_SLACK), asyncio.TaskGroup() as group:
            for container in context.registry.containers_of(sandbox_id):
                if container.state in (ContainerState.RUNNING, ContainerState.CREATED):
                    group.create_task(_stop_kindly(context, container))
    except TimeoutError:
        log.warning("containers do not end, their VM does", sandbox=sandbox_id)


async def _stop_kindly(context: Context, container: Container) -> None:
    try:
        await stop_container(context, container.id, CONTAINER_GRACE)
    except VmruntimeError as error:
        log.warning("container ends with its VM", container=container.id, error=str(error))


async def _stop_locked(context: Context, sandbox_id: str) -> None:
    try:
        sandbox = context.registry.sandbox(sandbox_id)
    except NotFound:
        return
    context.handover.discard(sandbox_id)
    if sandbox.state is SandboxState.READY:
        await context.registry.change_sandbox(sandbox_id, state=SandboxState.NOTREADY, reason="stopped on request")
    live = context.live.pop(sandbox_id, None)
    network_only = frozenset(ResourceKind) - {ResourceKind.NETWORK}
    try:
        with tracing.span("sandbox.network"):
            await context.owned.release(sandbox_id, keep=network_only)
    finally:
        if live is not None:
            await live.scope.close()
            try:
                with tracing.span("sandbox.shutdown"):
                    await live.running.shut_down(GUEST_GRACE)
            finally:
                await live.running.close()
        await end_containers(context, sandbox_id, "the sandbox was stopped")
        with tracing.span("sandbox.release"):
            await context.releaser(sandbox).release(sandbox_id, final=False)
    log.info("sandbox stopped", sandbox=sandbox_id)


async def _remove(context: Context, sandbox_id: str) -> None:
    await _stop(context, sandbox_id)
    async with context.locks.hold(sandbox_id):
        try:
            context.registry.sandbox(sandbox_id)
        except NotFound:
            return
        await context.registry.change_sandbox(sandbox_id, state=SandboxState.REMOVING)
        for container in context.registry.containers_of(sandbox_id, hidden=True):
            await forget_container(context, container)
        await context.owned.release(sandbox_id)
        await context.registry.drop_sandbox(sandbox_id)
    await context.images.sweep()
    log.info("sandbox removed", sandbox=sandbox_id)
