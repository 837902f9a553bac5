"""Changing the resources of containers and pods that run."""

from __future__ import annotations

import msgspec
import structlog

from vmruntime import tracing
from vmruntime.errors import FailedPrecondition
from vmruntime.model.container import ContainerState
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import Sandbox, SandboxState
from vmruntime.pods.context import Context
from vmruntime.pods.oci.resources import guest_resources, resource_limits

log = structlog.get_logger(__name__)

CHANGEABLE = frozenset({ContainerState.CREATED, ContainerState.RUNNING})


async def update_container(context: Context, container_id: str, wanted: LinuxResources) -> None:
    """Change a container's limits; what `wanted` leaves out stays. The VM grows first where that is needed.

    Raises:
        FailedPrecondition: It is neither created nor running.
        InvalidArgument: This host could never hold such a VM.
        HypervisorError: The VM cannot become so large.
    """
    async with context.locks.hold(container_id):
        container = context.registry.container(container_id)
        if container.state not in CHANGEABLE:
            raise FailedPrecondition(
                f"the container {container_id} is {container.state.value}; limits of created and running ones can change"
            )
        sandbox = context.registry.sandbox(container.sandbox_id)
        merged = merge(container.spec.resources, wanted)
        await grow(context, container.sandbox_id, {container_id: merged})
        agent = context.running(container.sandbox_id).running.agent
        await agent.update(
            container_id, msgspec.json.encode(resource_limits(guest_resources(merged, sandbox.spec.kind)))
        )
        spec = msgspec.structs.replace(container.spec, resources=merged)
        await context.registry.change_container(container_id, spec=spec)
    log.info("container resized", container=container_id)


async def update_sandbox(
    context: Context, sandbox_id: str, overhead: LinuxResources | None, resources: LinuxResources | None
) -> None:
    """Change what a pod may have in all; the VM grows, or gives memory back where the guest can.

    Raises:
        FailedPrecondition: It is not ready.
    """
    async with context.locks.hold(f"size {sandbox_id}"):
        sandbox = context.registry.sandbox(sandbox_id)
        if sandbox.state is not SandboxState.READY:
            raise FailedPrecondition(f"the sandbox {sandbox_id} is {sandbox.state.value}, not ready")
        spec = msgspec.structs.replace(
            sandbox.spec,
            overhead=sandbox.spec.overhead if overhead is None else overhead,
            resources=sandbox.spec.resources if resources is None else resources,
        )
        await _resize(context, msgspec.structs.replace(sandbox, spec=spec))
        await context.registry.change_sandbox(sandbox_id, spec=spec)
    log.info("sandbox resized", sandbox=sandbox_id)


async def grow(context: Context, sandbox_id: str, changed: dict[str, LinuxResources]) -> None:
    """Make a pod's VM large enough for its containers, some of them new or with other limits; never smaller.

    A pod that came with resources of its own, as kubelet's do, has room for its containers from the start.
    """
    async with context.locks.hold(f"size {sandbox_id}"):
        sandbox = context.registry.sandbox(sandbox_id)
        backend, present = context.backend(sandbox), _limits(context, sandbox_id, changed)
        before = backend.size(sandbox, list(present.values()))
        after = backend.size(sandbox, list((present | changed).values()))
        if after.vcpus > before.vcpus or after.memory_mib > before.memory_mib:
            with tracing.span("sandbox.resize"):
                await context.running(sandbox_id).running.resize(after)


async def _resize(context: Context, sandbox: Sandbox) -> None:
    size = context.backend(sandbox).size(sandbox, list(_limits(context, sandbox.id, {}).values()))
    with tracing.span("sandbox.resize"):
        await context.running(sandbox.id).running.resize(size)


def _limits(context: Context, sandbox_id: str, new: dict[str, LinuxResources]) -> dict[str, LinuxResources]:
    """Return the limits of a pod's containers that count, by id; one that is just being created does not yet."""
    return {
        container.id: container.spec.resources
        for container in context.registry.containers_of(sandbox_id, hidden=True)
        if container.state in CHANGEABLE or (container.state is ContainerState.CREATING and container.id not in new)
    }


def merge(old: LinuxResources, new: LinuxResources) -> LinuxResources:
    """Return the limits after a change; what the new ones leave out is the old one's.

    The limit of memory and swap together moves with the memory limit, so that the swap allowed stays what it was.
    """
    given = {
        name: value
        for name in LinuxResources.__struct_fields__
        if (value := getattr(new, name)) not in (0, "", {}) and name != "unified"
    }
    if new.memory_limit and not new.memory_swap_limit and old.memory_swap_limit > 0:
        given["memory_swap_limit"] = old.memory_swap_limit + new.memory_limit - old.memory_limit
    return msgspec.structs.replace(old, **given, unified={**old.unified, **new.unified})
