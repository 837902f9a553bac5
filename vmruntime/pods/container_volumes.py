"""A container's volumes and devices: made visible in its sandbox before it is created, taken away after it is removed."""

from __future__ import annotations

import msgspec
import structlog

from vmruntime.agent.interface import GuestContainer, GuestDevice
from vmruntime.errors import FailedPrecondition, NotFound
from vmruntime.model.container import Container, ContainerSpec
from vmruntime.model.image import Image
from vmruntime.pods.context import Context, Live
from vmruntime.pods.oci.mounts import BindMount
from vmruntime.sandboxes.interface import Published, RunningSandbox

log = structlog.get_logger(__name__)


class ContainerVolumes(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a container gets besides its root file system.

    Attributes:
        binds: Its mounts in CRI's order.
        images: Image volumes, in the order of their mounts.
    """

    binds: list[BindMount]
    published: Published
    images: list[Image]
    devices: list[GuestDevice]


def volume_images(context: Context, spec: ContainerSpec) -> list[Image]:
    """Return the images that a container mounts as volumes, in the order of its mounts.

    Raises:
        NotFound: One is not on this host.
    """
    images = []
    for number, mount in enumerate(spec.mounts):
        if mount.image:
            image = context.images.status(mount.image)
            if image is None:
                raise NotFound(
                    f"config.mounts[{number}].image: {mount.image!r} is not on this host", remedy="pull it first"
                )
            images.append(image)
    return images


async def attach_volumes(context: Context, live: Live, container: Container, images: list[Image]) -> ContainerVolumes:
    """Make a container's volumes and devices visible in its sandbox."""
    spec = container.edited
    published = await live.running.publish_volumes(container.id, spec.mounts)
    devices = await attach_devices(context, live, container)
    return ContainerVolumes(binds=_binds(spec, published), published=published, images=images, devices=devices)


async def attach_devices(context: Context, live: Live, container: Container) -> list[GuestDevice]:
    """Make a container's devices usable in its sandbox, and write down which disks they are."""

    async def record(serials: list[str]) -> None:
        await context.registry.change_container(container.id, disk_serials=serials)

    return await live.running.attach_devices(container.edited.devices, record)


async def detach_volumes(context: Context, live: Live, container: Container, *, again: bool) -> None:
    """Take them away again; a device that another container of the pod has stays.

    With `again`, which is not for the first time, volumes that the host does not let go of stay until the sandbox ends,
    rather than keep the container from being removed for ever.
    """
    try:
        await live.running.withdraw_volumes(container.id)
    except (FailedPrecondition, OSError) as error:
        if not again:
            raise
        log.error("volumes stay until their sandbox ends", container=container.id, error=str(error))

    def unused() -> list[str]:
        serials: dict[bool, set[str]] = {True: set(), False: set()}
        for one in context.registry.containers_of(container.sandbox_id, hidden=True):
            serials[one.id == container.id].update(one.disk_serials)
        return sorted(serials[True] - serials[False])

    if container.edited.devices:
        await live.running.release_devices(unused)


def tell_agent(request: GuestContainer, running: RunningSandbox, volumes: ContainerVolumes) -> GuestContainer:
    """Return the agent's request with what it has to know of the volumes."""
    return msgspec.structs.replace(
        request,
        share_tag=volumes.published.share_tag,
        memory_volumes=volumes.published.memory,
        image_volumes=[[running.layer_name(layer.serial) for layer in image.layers] for image in volumes.images],
        devices=volumes.devices,
    )


def _binds(spec: ContainerSpec, published: Published) -> list[BindMount]:
    sources, binds, image = iter(published.sources), [], 0
    for mount in spec.mounts:
        if mount.image:
            source = f"image:{image}/{mount.image_sub_path}".rstrip("/")
            image += 1
            binds.append(BindMount(destination=mount.container_path, source=source, readonly=True))
            continue
        found = next(sources)
        binds.append(
            BindMount(
                destination=mount.container_path,
                source=found.source,
                readonly=found.readonly,
                propagation=found.propagation,
                recursive_readonly=mount.recursive_readonly,
                options=mount.options,
            )
        )
    return binds
