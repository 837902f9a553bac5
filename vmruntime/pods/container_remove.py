"""RemoveContainer."""

from __future__ import annotations

import structlog

from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.errors import NotFound
from vmruntime.model.container import Container, ContainerState
from vmruntime.pods.container_volumes import detach_volumes
from vmruntime.pods.context import Context

log = structlog.get_logger(__name__)


async def remove_container(context: Context, container_id: str) -> None:
    """Kill and forget a container; unknown: success."""
    await context.shared.run(lambda: _remove(context, container_id), f"remove {container_id[:13]}")


async def _remove(context: Context, container_id: str) -> None:
    async with context.locks.hold(container_id):
        try:
            container = context.registry.container(container_id)
        except NotFound:
            return
        if container.state is not ContainerState.REMOVING:
            await context.registry.change_container(container_id, state=ContainerState.REMOVING)
        await delete_in_guest(context, container)
        await forget_container(context, container)
    await context.images.sweep()


async def delete_in_guest(context: Context, container: Container) -> None:
    """Take a container and the layers only it used out of its sandbox, if that still runs."""
    live = context.live.get(container.sandbox_id)
    if live is None:
        return
    try:
        released = await live.running.agent.delete(container.id)
        await live.running.release_layers(released)
        await detach_volumes(context, live, container)
    except AgentGone as error:
        log.info("sandbox is gone, nothing to delete there", container=container.id, error=str(error))
    except AgentError as error:
        log.warning("agent could not delete a container", container=container.id, error=str(error))
        raise
    pump = live.pumps.pop(container.id, None)
    if pump is not None:
        await pump.wait_drained(1.0)


async def forget_container(context: Context, container: Container) -> None:
    """Remove what the host keeps of a container."""
    context.handover.discard(container.id)
    context.log_position(container.id).unlink(missing_ok=True)
    await context.images.touch(container.image_ids)  # used until now; before it stops counting as used
    await context.registry.drop_container(container.id)
