"""What a container is: what was asked for, and what became of it."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import Namespaces, UserNamespace


class ContainerState(enum.Enum):
    """CRI's container states, and two that only the store knows (see model/lifecycle.py)."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown"
    REMOVING = "removing"


class ContainerMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The name kubelet gives a container; unique in its sandbox."""

    name: str
    attempt: int = 0


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """One CRI mount. `propagation` is private, rslave or rshared; `image` is an image volume's reference.

    Attributes:
        options: More options of mount(8), such as nosuid.
        ids: Files of id N here are the container's of `ids`' outside of N; None: they keep their owners.
        field: Its name in the request, when that is not config.mounts[N].
        must_exist: A host path that is missing is an error, rather than made a directory.
    """

    container_path: str
    host_path: str = ""
    readonly: bool = False
    recursive_readonly: bool = False
    propagation: str = "private"
    image: str = ""
    image_sub_path: str = ""
    options: list[str] = []
    ids: UserNamespace | None = None
    field: str = ""
    must_exist: bool = False


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A host device asked for; permissions are letters of "rwm".

    Attributes:
        field: Its name in the request, when that is not config.devices[].
        type, major, minor: What it is, when it need not be looked at on the host: b, c or p; empty: as on the host.
        mode, uid, gid: Of the node in the container; None: the host's mode, and root's.
        users: Where uid and gid are None, they are those of the container's user.
    """

    container_path: str
    host_path: str
    permissions: str
    field: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    users: bool = False


class SecurityProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A seccomp or AppArmor profile: kind is "runtime/default", "unconfined" or "localhost"."""

    kind: str = "unconfined"
    path: str = ""


class SecurityContext(msgspec.Struct, frozen=True, kw_only=True):
    """CRI's LinuxContainerSecurityContext. None for an id means not given."""

    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_username: str = ""
    supplemental_groups: list[int] = []
    supplemental_groups_strict: bool = False
    add_capabilities: list[str] = []
    drop_capabilities: list[str] = []
    add_ambient_capabilities: list[str] = []
    privileged: bool = False
    readonly_rootfs: bool = False
    no_new_privs: bool = False
    masked_paths: list[str] = []
    readonly_paths: list[str] = []
    seccomp: SecurityProfile = SecurityProfile()
    apparmor: SecurityProfile = SecurityProfile()
    selinux_given: bool = False
    namespaces: Namespaces = Namespaces()


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What CreateContainer asked for.

    Attributes:
        image: The reference to run, as kubelet sent it (an id, or what PullImage returned).
        user_image: What the user wrote in the pod, reported back.
        envs: (name, value) in order; values are text, kept as given.
        log_path: Absolute path of the CRI log file; empty: output is read and dropped.
        stop_signal: Signal name such as SIGQUIT; empty: the image's, else SIGTERM.
    """

    metadata: ContainerMetadata
    image: str
    user_image: str = ""
    command: list[str] = []
    args: list[str] = []
    working_dir: str = ""
    envs: list[tuple[str, str]] = []
    mounts: list[Mount] = []
    devices: list[Device] = []
    cdi_devices: list[str] = []
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    security: SecurityContext = SecurityContext()
    resources: LinuxResources = LinuxResources()
    stop_signal: str = ""


class ContainerEdits(msgspec.Struct, frozen=True, kw_only=True):
    """What devices named by CDI add to a container; a later one of the same variable or place wins over an earlier one.

    Attributes:
        envs: (name, value) in order.
        groups: Supplemental groups.
        hooks: The member "hooks" of an OCI configuration.
    """

    envs: list[tuple[str, str]] = []
    mounts: list[Mount] = []
    devices: list[Device] = []
    groups: list[int] = []
    hooks: dict[str, list[dict[str, Any]]] = {}


class ContainerUser(msgspec.Struct, frozen=True, kw_only=True):
    """The ids a container's first process runs with."""

    uid: int
    gid: int
    groups: list[int] = []


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """One container as the store keeps it. Times are nanoseconds since the epoch, 0 when not reached.

    Attributes:
        image_id: Id of the image that runs, "sha256:…".
        image_ref: The digest reference reported as ContainerStatus.image_ref.
        volume_image_ids: Ids of the images that are mounted as volumes.
        disk: Digest of the VM image's disk that it boots; empty: not of an image pod.
        disk_serials: Serials of the block devices that were plugged in for it: a path may later name another device.
        stop_signal: The signal StopContainer sends first, by number.
        edits: What its CDI devices add to the specification.
        reason: Completed, Error, OOMKilled or what happened to the VM.
    """

    id: str
    sandbox_id: str
    spec: ContainerSpec
    state: ContainerState
    created_at: int
    image_id: str = ""
    image_ref: str = ""
    volume_image_ids: list[str] = []
    layers: list[str] = []
    disk: str = ""
    disk_serials: list[str] = []
    stop_signal: int = 15
    edits: ContainerEdits = ContainerEdits()
    user: ContainerUser | None = None
    pid: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""

    @property
    def edited(self) -> ContainerSpec:
        """What CRI asked for, with everything but hooks of what its CDI devices add."""
        spec, edits = self.spec, self.edits
        groups = dict.fromkeys([*spec.security.supplemental_groups, *edits.groups])
        return msgspec.structs.replace(
            spec,
            envs=[*spec.envs, *edits.envs],
            mounts=[*spec.mounts, *edits.mounts],
            devices=[*spec.devices, *edits.devices],
            security=msgspec.structs.replace(spec.security, supplemental_groups=list(groups)),
        )

    @property
    def image_ids(self) -> list[str]:
        """Ids of all images it is made of."""
        return [self.image_id, *self.volume_image_ids]
