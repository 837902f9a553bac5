"""CreateContainer: layers into the VM, the OCI spec, the agent's create."""

from __future__ import annotations

import asyncio
import contextlib
import functools

import msgspec
import structlog

from vmruntime import tracing
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.interface import GuestContainer, PidMode
from vmruntime.errors import AlreadyExists, Code, FailedPrecondition, NotFound, VmruntimeError
from vmruntime.model.container import Container, ContainerSpec, ContainerState, ContainerUser
from vmruntime.model.image import Image
from vmruntime.model.sandbox import NamespaceMode, Sandbox, SandboxKind, SandboxState
from vmruntime.pods.container_cdi import cdi_edits
from vmruntime.pods.container_hooks import add_hooks, told_hook
from vmruntime.pods.container_remove import delete_in_guest
from vmruntime.pods.container_volumes import ContainerVolumes, attach_volumes, tell_agent, volume_images
from vmruntime.pods.context import Context, Live
from vmruntime.pods.image_container import machine_container
from vmruntime.pods.log_pump import LogPump
from vmruntime.pods.monitor import now_or_later
from vmruntime.pods.oci.capabilities import ALL, of_this_process
from vmruntime.pods.oci.signals import stop_signal
from vmruntime.pods.oci.spec import build_oci_spec
from vmruntime.pods.oci.user import resolve_user
from vmruntime.pods.resize import grow
from vmruntime.pods.spans import note_made
from vmruntime.pods.vm_end import vm_end_told
from vmruntime.sandboxes.interface import LayerDisk, RunningSandbox

log = structlog.get_logger(__name__)

PID_MODES = {
    NamespaceMode.CONTAINER: PidMode.CONTAINER,
    NamespaceMode.POD: PidMode.POD,
    NamespaceMode.TARGET: PidMode.TARGET,
    NamespaceMode.NODE: PidMode.HOST,
}


async def create_container(context: Context, sandbox_id: str, spec: ContainerSpec) -> str:
    """Prepare a container and return its id; see pods.interface.Pods.create_container."""
    name = f"{sandbox_id} {spec.metadata.name} {spec.metadata.attempt}"
    with contextlib.ExitStack() as stack:
        stack.callback(await context.locks.take(f"container {name}"))  # see run_sandbox
        for other in context.registry.containers_of(sandbox_id, hidden=True):
            if other.spec.metadata == spec.metadata:
                return _hand_over(context, other, spec)
        sandbox = context.registry.sandbox(sandbox_id)
        if sandbox.state is not SandboxState.READY:
            raise FailedPrecondition(f"the sandbox {sandbox_id} is {sandbox.state.value}: {sandbox.reason}")
        container_id = context.new_id()
        held = stack.pop_all()

        async def create() -> None:
            context.handover.add(container_id)
            try:
                await _create(context, sandbox, container_id, spec)
            except BaseException:
                context.handover.discard(container_id)
                raise

        await context.shared.run(create, f"create {container_id[:13]}", owning=held.close)
    context.handover.discard(container_id)
    return container_id


def _hand_over(context: Context, other: Container, spec: ContainerSpec) -> str:
    if other.id in context.handover and other.state is ContainerState.CREATED and other.spec == spec:
        context.handover.discard(other.id)
        return other.id
    raise AlreadyExists(
        f"config.metadata: the container name {spec.metadata.name} (attempt {spec.metadata.attempt}) is taken in"
        f" its sandbox by {other.id} ({other.state.value})",
        remedy="remove that container, or use another attempt number",
    )


async def _create(context: Context, sandbox: Sandbox, container_id: str, spec: ContainerSpec) -> None:
    edits = await cdi_edits(context, sandbox, spec)
    # Nothing is awaited from here until the container is in the registry: an image removed meanwhile would be missing.
    image = context.images.status(spec.image)
    if image is None:
        raise NotFound(f"config.image: {spec.image!r} is not on this host", remedy="pull it first")
    mounted = volume_images(context, spec)
    container = Container(
        id=container_id,
        sandbox_id=sandbox.id,
        spec=spec,
        state=ContainerState.CREATING,
        created_at=context.clock.now_ns(),
        image_id=image.id,
        image_ref=image.repo_digests[0] if image.repo_digests else image.id,
        volume_image_ids=[one.id for one in mounted],
        layers=[layer.diff_id for one in (image, *mounted) for layer in one.layers],
        stop_signal=stop_signal(spec, image.config),
        edits=edits,
    )
    note_made(context, container)
    live = context.running(sandbox.id)
    async with context.locks.hold(container_id):
        # From here on the image's layers count as used: a removal of the image leaves them in place.
        await context.registry.add_container(container)
        try:
            await context.images.touch(container.image_ids)
            async with vm_end_told(live.running):
                await _create_in_guest(context, live, container, image, mounted)
        except BaseException:
            await asyncio.shield(_undo(context, container))
            raise


async def _create_in_guest(
    context: Context, live: Live, container: Container, image: Image, mounted: list[Image]
) -> None:
    await grow(context, container.sandbox_id, {container.id: container.spec.resources})
    if context.registry.sandbox(container.sandbox_id).spec.kind is SandboxKind.IMAGE:
        request = await machine_container(context, live, container, image)
    else:
        request = await _prepared(context, live, container, image, mounted)
    pump = LogPump(live.running.agent, container.id, container.spec.log_path, context.log_position(container.id))
    await pump.open()
    pid, user, message = 0, None, ""
    try:
        with tracing.span("container.create"):
            pid, user = await live.running.agent.create(request)
        if context.live.get(container.sandbox_id) is not live:
            raise AgentGone("the sandbox ended meanwhile")
        live.scope.start(pump.run(), f"log of {container.id[:13]}")
        live.pumps[container.id] = pump
    except AgentError as error:
        if not is_missing_command(error):
            raise (await told_hook(context, container, error)) from error
        # Users expect the container to exist and its start to fail: kubelet then shows the message and backs off.
        message = error.message
    finally:
        if container.id not in live.pumps:
            await pump.close()
    await _created(context, container, pid, user, message)


async def _prepared(
    context: Context, live: Live, container: Container, image: Image, mounted: list[Image]
) -> GuestContainer:
    """Make layers, volumes and devices visible in the guest, and return what the agent needs besides."""
    layers = [layer for one in (image, *mounted) for layer in one.layers]
    disks = [LayerDisk(path=context.images.layer_path(layer), serial=layer.serial) for layer in layers]
    with tracing.span("container.layers", {"vmruntime.layers": len(disks)}):
        await live.running.attach_layers(disks)
    with tracing.span("container.volumes"):
        volumes = await attach_volumes(context, live, container, mounted)
    with tracing.span("container.spec"):
        return await guest_container(context, live.running, container, image, volumes)


async def _created(context: Context, container: Container, pid: int, user: ContainerUser | None, message: str) -> None:
    await context.registry.change_container(
        container.id, state=ContainerState.CREATED, pid=pid, user=user, message=message
    )
    log.info("container created", container=container.id, name=container.spec.metadata.name)


def is_missing_command(error: AgentError) -> bool:
    """Whether the agent says that the command is not there or cannot be executed."""
    return error.code is Code.INVALID_ARGUMENT and "exec" in error.message


async def guest_container(
    context: Context, running: RunningSandbox, container: Container, image: Image, volumes: ContainerVolumes
) -> GuestContainer:
    """Return what the agent needs to create a container."""
    spec = container.edited
    sandbox = context.registry.sandbox(container.sandbox_id)
    user, groups, image_groups = resolve_user(spec.security, image.config)
    oci_spec = build_oci_spec(
        spec,
        image.config,
        sandbox.spec,
        load_profile=context.load_profile,
        volumes=volumes.binds,
        capabilities=of_this_process() if sandbox.spec.kind is SandboxKind.HOST else ALL,
    )
    await add_hooks(context, sandbox, container, oci_spec)
    namespaces = spec.security.namespaces
    if namespaces.pid is NamespaceMode.NODE and sandbox.spec.kind is not SandboxKind.HOST:
        raise FailedPrecondition(
            "config.linux.security_context.namespace_options.pid: NODE, but the pod runs in a VM, which the host's PID"
            " namespace cannot be shared with",
            remedy="ask for it in the sandbox's security context too, so that the pod runs on the host",
        )
    if namespaces.pid is NamespaceMode.TARGET:
        _check_target(context, sandbox, namespaces.target_id)
    request = GuestContainer(
        id=container.id,
        oci_spec=msgspec.json.encode(oci_spec),
        layer_serials=[running.layer_name(layer.serial) for layer in image.layers],
        readonly_rootfs=spec.security.readonly_rootfs,
        user=user,
        groups=groups,
        image_groups=image_groups,
        pid_mode=PID_MODES[namespaces.pid],
        pid_target=namespaces.target_id if namespaces.pid is NamespaceMode.TARGET else "",
        tty=spec.tty,
        stdin=spec.stdin,
        stdin_once=spec.stdin_once,
        all_devices=spec.security.privileged,
    )
    return tell_agent(request, running, volumes)


def _check_target(context: Context, sandbox: Sandbox, target_id: str) -> None:
    target = context.registry.container(target_id)
    if target.sandbox_id != sandbox.id or target.state is not ContainerState.RUNNING:
        raise FailedPrecondition(
            f"config.linux.security_context.namespace_options.target_id: {target_id!r} is not a running container"
            " of this pod",
            remedy="give the id of one that runs",
        )


async def _undo(context: Context, container: Container) -> None:
    """Leave nothing of a container that was not created; whatever else fails, its name is free again."""
    try:
        await delete_in_guest(context, container, again=True)
    except VmruntimeError as error:
        log.error("clean-up left something behind", container=container.id, error=str(error))
    except Exception:  # such as an OSError or a defect
        log.exception("clean-up left something behind", container=container.id)
    with contextlib.suppress(OSError):
        context.log_position(container.id).unlink()
    drop = functools.partial(context.registry.drop_container, container.id)
    await now_or_later(context, drop, container=container.id)
