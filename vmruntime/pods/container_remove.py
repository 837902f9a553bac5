"""RemoveContainer."""

from __future__ import annotations

import structlog

from vmruntime import tracing
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.errors import NotFound
from vmruntime.hypervisor.errors import VmGone
from vmruntime.model.container import Container, ContainerState
from vmruntime.model.image import layer_serial
from vmruntime.pods.container_volumes import detach_volumes
from vmruntime.pods.context import Context
from vmruntime.pods.spans import note_container
from vmruntime.pods.vm_end import end_of

log = structlog.get_logger(__name__)


async def remove_container(context: Context, container_id: str) -> None:
    """Kill and forget a container; unknown: success."""
    note_container(context, container_id)
    await context.shared.run(lambda: _remove(context, container_id), f"remove {container_id[:13]}")


async def _remove(context: Context, container_id: str) -> None:
    async with context.locks.hold(container_id):
        try:
            container = context.registry.container(container_id)
        except NotFound:
            return
        again = container.state is ContainerState.REMOVING
        if not again:
            await context.registry.change_container(container_id, state=ContainerState.REMOVING)
        await delete_in_guest(context, container, again=again)
        await forget_container(context, container)
    await context.images.sweep()


async def delete_in_guest(context: Context, container: Container, *, again: bool) -> None:
    """Take a container and the layers only it used out of its sandbox, if that still runs.

    What `again` changes, see detach_volumes().

    Raises:
        AgentError: The agent refused, or was not reached although the sandbox goes on.
        HypervisorError: Something could not be unplugged.
    """
    live = context.live.get(container.sandbox_id)
    if live is None:
        return
    try:
        with tracing.span("container.delete"):
            await live.running.agent.delete(container.id)
        with tracing.span("container.detach"):
            await live.running.release_layers(_unused_layers(context, container))
            await detach_volumes(context, live, container, again=again)
    except (AgentGone, VmGone) as error:
        if await end_of(live.running) is None:
            raise
        log.info("sandbox is gone, nothing to delete there", container=container.id, error=str(error))
    except AgentError as error:
        log.warning("agent could not delete a container", container=container.id, error=str(error))
        raise
    pump = live.pumps.pop(container.id, None)
    if pump is not None:
        await pump.wait_drained(1.0)


def _unused_layers(context: Context, container: Container) -> list[str]:
    """Return the serials of a container's layers that no other one in its sandbox has.

    The agent's word would not do: another container may be about to use a layer that the guest has just let go of, and of
    a container that it does not have, or has deleted before, it says nothing.
    """
    others = context.registry.containers_of(container.sandbox_id, hidden=True)
    used = {layer for other in others if other.id != container.id for layer in other.layers}
    return [layer_serial(layer) for layer in dict.fromkeys(container.layers) if layer not in used]


async def forget_container(context: Context, container: Container) -> None:
    """Remove what the host keeps of a container."""
    context.handover.discard(container.id)
    context.log_position(container.id).unlink(missing_ok=True)
    await context.images.touch(container.image_ids)  # used until now; before it stops counting as used
    await context.registry.drop_container(container.id)
