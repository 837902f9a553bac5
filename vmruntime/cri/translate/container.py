"""Containers: CreateContainer's configuration in, status and list entries out."""

from __future__ import annotations

import json
import re

from vmruntime.cri.translate.checks import (
    ARGUMENT_LIMIT,
    PATH_LIMIT,
    absolute_path,
    bad,
    joined_path,
    missing,
    required,
    text,
    text_map,
    texts,
)
from vmruntime.cri.translate.resources import resources_from_cri, resources_to_cri
from vmruntime.cri.translate.security import check_shared_namespaces, security_from_cri
from vmruntime.cri.translate.userns import check_container, check_ids, check_image_volumes, ids_from_cri, ids_to_cri
from vmruntime.errors import InvalidArgument
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import (
    Container,
    ContainerMetadata,
    ContainerSpec,
    ContainerState,
    ContainerUser,
    Device,
    Mount,
)
from vmruntime.model.sandbox import SandboxKind, SandboxSpec, UserNamespace
from vmruntime.pods.oci.signals import signal_name, signal_number

_STATES: dict[ContainerState, cri.ContainerState.ValueType] = {
    ContainerState.CREATING: cri.CONTAINER_CREATED,
    ContainerState.CREATED: cri.CONTAINER_CREATED,
    ContainerState.RUNNING: cri.CONTAINER_RUNNING,
    ContainerState.EXITED: cri.CONTAINER_EXITED,
    ContainerState.REMOVING: cri.CONTAINER_EXITED,
    ContainerState.UNKNOWN: cri.CONTAINER_UNKNOWN,
}
_PROPAGATION = {0: "private", 1: "rslave", 2: "rshared"}
_PROPAGATION_BACK: dict[str, cri.MountPropagation.ValueType] = {
    "private": cri.PROPAGATION_PRIVATE,
    "rslave": cri.PROPAGATION_HOST_TO_CONTAINER,
    "rshared": cri.PROPAGATION_BIDIRECTIONAL,
}
# The flags of a mount point (mount(8)) beside what has fields of its own; kubelet gives noexec, nodev and nosuid.
_MOUNT_OPTIONS = frozenset({"noexec", "nodev", "nosuid", "exec", "dev", "suid", "noatime", "nodiratime", "relatime"})
# vendor.com/class=name, from the Container Device Interface's specification.
_CDI_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*/[A-Za-z][A-Za-z0-9_.-]*=[A-Za-z0-9][A-Za-z0-9_.:-]*")


def container_from_cri(
    request: cri.CreateContainerRequest, sandbox: SandboxSpec, *, supported: frozenset[SandboxKind]
) -> ContainerSpec:
    """Translate CreateContainer for a container of `sandbox`.

    The sandbox's own specification counts, not the copy in the request, which clients may leave out.

    Raises:
        InvalidArgument: A field is missing or cannot be used; the message names it.
        Unimplemented: A field asks for what this version does not do.
    """
    if not request.HasField("config"):
        raise missing("config")
    config = request.config
    if not config.HasField("metadata"):
        raise missing("config.metadata")
    if not config.HasField("image"):
        raise missing("config.image")
    if config.HasField("windows"):
        raise InvalidArgument("config.windows: this runtime runs Linux containers")
    security = security_from_cri(
        "config.linux.security_context",
        config.linux.security_context,
        host_supported=SandboxKind.HOST in supported,
    )
    if security.privileged and not sandbox.privileged:
        raise InvalidArgument(
            "config.linux.security_context.privileged: the sandbox was not made for privileged containers",
            remedy="set privileged in the sandbox's security context too",
        )
    context = "config.linux.security_context"
    options = config.linux.security_context.namespace_options
    pod = sandbox.namespaces
    check_shared_namespaces(f"{context}.namespace_options", security.namespaces, pod)
    check_container(f"{context}.namespace_options.userns_options", options, security.namespaces.user_namespace, pod)
    check_ids(context, security, pod.user_namespace)
    mounts = [_mount(f"config.mounts[{i}]", mount) for i, mount in enumerate(config.mounts)]
    check_image_volumes("config.mounts", mounts, pod.user_namespace)
    return ContainerSpec(
        metadata=ContainerMetadata(
            name=required("config.metadata.name", config.metadata.name), attempt=config.metadata.attempt
        ),
        image=required("config.image.image", config.image.image),
        user_image=text("config.image.user_specified_image", config.image.user_specified_image),
        command=texts("config.command", config.command, limit=ARGUMENT_LIMIT),
        args=texts("config.args", config.args, limit=ARGUMENT_LIMIT),
        working_dir=(absolute_path("config.working_dir", config.working_dir) if config.working_dir else ""),
        envs=_envs("config.envs", config),
        mounts=mounts,
        devices=[_device(f"config.devices[{i}]", device) for i, device in enumerate(config.devices)],
        cdi_devices=_cdi_devices("config.CDI_devices", config),
        labels=text_map("config.labels", config.labels),
        annotations=text_map("config.annotations", config.annotations),
        log_path=_log_path(sandbox.log_directory, config.log_path),
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        tty=config.tty,
        security=security,
        resources=resources_from_cri("config.linux.resources", config.linux.resources),
        stop_signal=_stop_signal("config.stop_signal", config.stop_signal),
    )


def state_to_cri(state: ContainerState) -> cri.ContainerState.ValueType:
    """Translate the state; what only the store knows shows as the nearest one."""
    return _STATES[state]


def container_item(container: Container) -> cri.Container:
    """Translate one entry of ListContainers."""
    spec = container.spec
    return cri.Container(
        id=container.id,
        pod_sandbox_id=container.sandbox_id,
        metadata=metadata_to_cri(spec.metadata),
        image=_image_spec(spec),
        image_ref=container.image_ref,
        image_id=container.image_id,
        state=state_to_cri(container.state),
        created_at=container.created_at,
        labels=spec.labels,
        annotations=spec.annotations,
    )


def container_status(container: Container) -> cri.ContainerStatus:
    """Translate a container's status."""
    spec = container.spec
    user = container.user
    return cri.ContainerStatus(
        id=container.id,
        metadata=metadata_to_cri(spec.metadata),
        state=state_to_cri(container.state),
        created_at=container.created_at,
        started_at=container.started_at,
        finished_at=container.finished_at,
        exit_code=container.exit_code,
        image=_image_spec(spec),
        image_ref=container.image_ref,
        image_id=container.image_id,
        reason=container.reason,
        message=container.message,
        labels=spec.labels,
        annotations=spec.annotations,
        mounts=_mounts_to_cri(container),
        log_path=spec.log_path,
        resources=cri.ContainerResources(linux=resources_to_cri(spec.resources)),
        user=_user_to_cri(user) if user else None,
        stop_signal=_signal_to_cri(container.stop_signal),
    )


def container_info(container: Container) -> dict[str, str]:
    """Return what `crictl inspect` shows beside the status. Environment values may be secrets and stay out."""
    info = {
        "sandboxID": container.sandbox_id,
        "state": container.state.value,
        "pid": container.pid,
        "layers": container.layers,
        "privileged": container.spec.security.privileged,
        "command": container.spec.command,
        "args": container.spec.args,
        "tty": container.spec.tty,
        "stdin": container.spec.stdin,
    }
    return {"info": json.dumps(info)}


def metadata_to_cri(metadata: ContainerMetadata) -> cri.ContainerMetadata:
    """Translate the name back."""
    return cri.ContainerMetadata(name=metadata.name, attempt=metadata.attempt)


def _image_spec(spec: ContainerSpec) -> cri.ImageSpec:
    return cri.ImageSpec(image=spec.image, user_specified_image=spec.user_image)


def _envs(name: str, config: cri.ContainerConfig) -> list[tuple[str, str]]:
    envs = []
    for i, entry in enumerate(config.envs):
        key = required(f"{name}[{i}].key", entry.key, limit=ARGUMENT_LIMIT)
        if "=" in key:
            raise bad(f"{name}[{i}].key", key, "contains '='")
        # The value may be a secret: messages name the variable only.
        try:
            value = entry.value.decode()
        except UnicodeDecodeError:
            raise InvalidArgument(f"{name}[{i}] ({key}): the value is not UTF-8") from None
        if "\0" in value:
            raise InvalidArgument(f"{name}[{i}] ({key}): the value contains a NUL character")
        if len(key) + len(entry.value) + 1 > ARGUMENT_LIMIT:
            raise InvalidArgument(
                f"{name}[{i}] ({key}): {len(entry.value)} bytes are more than Linux passes on ({ARGUMENT_LIMIT})"
            )
        envs.append((key, value))
    return envs


def _mount(name: str, mount: cri.Mount) -> Mount:
    propagation = _PROPAGATION.get(mount.propagation)
    if propagation is None:
        raise bad(f"{name}.propagation", int(mount.propagation), "is not a known propagation")
    image = ""
    if mount.HasField("image"):
        image = required(f"{name}.image.image", mount.image.image)
        if mount.host_path:
            raise InvalidArgument(f"{name}: host_path and image exclude each other")
        if not mount.readonly:
            raise InvalidArgument(f"{name}.readonly must be true for an image volume, which nobody can write to")
    if mount.recursive_read_only and not mount.readonly:
        raise InvalidArgument(f"{name}.recursive_read_only: true, but readonly is not", remedy="set readonly as well")
    if mount.recursive_read_only and propagation != "private":
        raise InvalidArgument(
            f"{name}.recursive_read_only: true, but propagation is not private", remedy="use PROPAGATION_PRIVATE"
        )
    sub_path = text(f"{name}.image_sub_path", mount.image_sub_path, limit=PATH_LIMIT)
    if sub_path.startswith("/") or ".." in sub_path.split("/"):
        raise bad(f"{name}.image_sub_path", sub_path, "does not stay in the image")
    options = texts(f"{name}.mount_options", mount.mount_options)
    for i, option in enumerate(options):
        if option not in _MOUNT_OPTIONS:
            raise bad(
                f"{name}.mount_options[{i}]",
                option,
                "is not an option of bind mounts",
                remedy=f"one of {', '.join(sorted(_MOUNT_OPTIONS))}; readonly and propagation have fields of their own",
            )
    return Mount(
        container_path=absolute_path(f"{name}.container_path", mount.container_path),
        host_path="" if image else absolute_path(f"{name}.host_path", mount.host_path),
        readonly=mount.readonly,
        recursive_readonly=mount.recursive_read_only,
        propagation=propagation,
        image=image,
        image_sub_path=sub_path,
        options=options,
        ids=_mount_ids(name, mount),
    )


def _mount_ids(name: str, mount: cri.Mount) -> UserNamespace | None:
    if not mount.uidMappings and not mount.gidMappings:
        return None
    return ids_from_cri(f"{name}.uidMappings", mount.uidMappings, f"{name}.gidMappings", mount.gidMappings)


def _user_to_cri(user: ContainerUser) -> cri.ContainerUser:
    """Return a user; among its groups the primary one, as containerd and CRI-O report it and cri-tools expects it."""
    groups = sorted({user.gid, *user.groups})
    return cri.ContainerUser(linux=cri.LinuxContainerUser(uid=user.uid, gid=user.gid, supplemental_groups=groups))


def _mounts_to_cri(container: Container) -> list[cri.Mount]:
    """Return a container's mounts; those of images name what they were resolved to, as PullImage does."""
    ids = iter(container.volume_image_ids)
    return [_mount_to_cri(mount, next(ids, "") if mount.image else "") for mount in container.spec.mounts]


def _mount_to_cri(mount: Mount, image_ref: str) -> cri.Mount:
    return cri.Mount(
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly=mount.readonly,
        recursive_read_only=mount.recursive_readonly,
        propagation=_PROPAGATION_BACK.get(mount.propagation, cri.PROPAGATION_PRIVATE),
        image=cri.ImageSpec(image=mount.image, image_ref=image_ref) if mount.image else None,
        image_sub_path=mount.image_sub_path,
        mount_options=mount.options,
        uidMappings=ids_to_cri(mount.ids.uids) if mount.ids else [],
        gidMappings=ids_to_cri(mount.ids.gids) if mount.ids else [],
    )


def _device(name: str, device: cri.Device) -> Device:
    permissions = text(f"{name}.permissions", device.permissions) or "rwm"
    if len(set(permissions)) != len(permissions) or not set(permissions) <= set("rwm"):
        raise bad(
            f"{name}.permissions", permissions, "is not made of the letters r, w and m", remedy="use rwm, rw or r"
        )
    return Device(
        container_path=absolute_path(f"{name}.container_path", device.container_path),
        host_path=absolute_path(f"{name}.host_path", device.host_path),
        permissions=permissions,
    )


def _cdi_devices(name: str, config: cri.ContainerConfig) -> list[str]:
    names = []
    for i, device in enumerate(config.CDI_devices):
        required(f"{name}[{i}].name", device.name)
        if not _CDI_NAME.fullmatch(device.name):
            raise bad(f"{name}[{i}].name", device.name, "is not a CDI name", remedy="write vendor.com/class=name")
        names.append(device.name)
    return names


def _log_path(directory: str, value: str) -> str:
    # Either part missing means that output is not kept; kubelet always gives both.
    if not value:
        return ""
    path = joined_path(directory, "config.log_path", value)
    return path if directory else ""


def _stop_signal(name: str, value: int) -> str:
    if value == cri.SIGNAL_RUNTIME_DEFAULT:
        return ""
    try:
        wire = cri.Signal.Name(cri.Signal.ValueType(value))
    except ValueError:
        raise bad(name, value, "is not a known signal") from None
    # SIGNAL_SIGRTMINPLUS3 is SIGRTMIN+3 everywhere else; a name that signal_number does not know shows here.
    plain = wire.removeprefix("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-")
    signal_number(plain)
    return plain


def _signal_to_cri(number: int) -> cri.Signal.ValueType:
    name = signal_name(number)
    wire = "SIGNAL_" + name.replace("+", "PLUS").replace("-", "MINUS")
    try:
        return cri.Signal.Value(wire)
    except ValueError:
        return cri.SIGNAL_RUNTIME_DEFAULT
