"""CreateContainer in an image pod: its one container is the VM itself."""

from __future__ import annotations

import structlog

from vmruntime import tracing
from vmruntime.agent.interface import GuestContainer, GuestMachine
from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.model.container import Container, ContainerSpec, ContainerState
from vmruntime.model.image import Image
from vmruntime.pods.container_volumes import attach_devices
from vmruntime.pods.context import Context, Live

log = structlog.get_logger(__name__)

SEED = "say it to cloud-init: annotation vmruntime.io/cloud-init-user-data"


async def machine_container(context: Context, live: Live, container: Container, image: Image) -> GuestContainer:
    """Return what the machine of a container is to be.

    Raises:
        InvalidArgument: The container asks for what a VM cannot have.
        FailedPrecondition: The pod has its container already, or the image has no disk.
    """
    check(container.spec)
    _check_alone(context, container)
    with tracing.span("container.disk"):
        path, disk = await context.images.vm_disk(image)
    await context.registry.change_container(container.id, disk=disk.digest)
    with tracing.span("container.volumes"):
        await live.running.publish_volumes(container.id, container.edited.mounts)
        await attach_devices(context, live, container)
    # Not as the pod was when it was made: its limits may have changed.
    sandbox = context.registry.sandbox(container.sandbox_id)
    size = context.backend(sandbox).size(sandbox, [container.edited.resources])
    machine = GuestMachine(spec=container.edited, image_id=image.id, disk=disk, disk_path=str(path), size=size)
    return GuestContainer(id=container.id, machine=machine)


def check(spec: ContainerSpec) -> None:
    """Refuse what means nothing for a VM that boots its own image, rather than leave it out without a word.

    Raises:
        InvalidArgument: With the field, its value and what to do instead.
    """
    for name, value in (("command", spec.command), ("args", spec.args), ("working_dir", spec.working_dir)):
        if value:
            raise InvalidArgument.field(
                f"config.{name}", value, "means nothing in a pod of kind image, which boots its image", remedy=SEED
            )
    if spec.cdi_devices:
        raise InvalidArgument.field(
            "config.CDI_devices", spec.cdi_devices, "cannot be had by a pod of kind image", remedy="leave them out"
        )


def _check_alone(context: Context, container: Container) -> None:
    """Refuse a second container: a VM is one. One that has ended may come again, as kubelet does after a crash."""
    for other in context.registry.containers_of(container.sandbox_id, hidden=True):
        if other.id == container.id:
            continue
        name, wanted = other.spec.metadata.name, container.spec.metadata.name
        if name != wanted:
            raise FailedPrecondition(
                f"config.metadata.name: {wanted!r} would be the pod's second container, beside {name!r}; a pod of kind image"
                " is one VM and has one",
                remedy="take the container out, init containers as well, or put it into another pod",
            )
        if other.state not in (ContainerState.EXITED, ContainerState.REMOVING):
            raise FailedPrecondition(
                f"config.metadata: the pod's VM is {other.state.value} already, as the container {other.id}",
                remedy="stop that first",
            )
