"""Security contexts and namespaces, of sandboxes and containers."""

from __future__ import annotations

from collections.abc import Iterable

from vmruntime.cri.translate.checks import (
    ID_LIMIT,
    NAME_LIMIT,
    absolute_path,
    bad,
    number,
    required,
    shorten,
    text,
    texts,
)
from vmruntime.cri.translate.userns import user_namespace_from_cri, user_namespace_to_cri
from vmruntime.errors import InvalidArgument, Unimplemented
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import SecurityContext, SecurityProfile
from vmruntime.model.sandbox import NamespaceMode, Namespaces

# The kinds the deprecated string fields use; the typed ones are translated to the same.
RUNTIME_DEFAULT = "runtime/default"
UNCONFINED = "unconfined"
LOCALHOST = "localhost"

_PROFILE_KINDS = {0: RUNTIME_DEFAULT, 1: UNCONFINED, 2: LOCALHOST}


def namespaces_from_cri(
    name: str, message: cri.NamespaceOption, *, host_supported: bool, container: bool
) -> Namespaces:
    """Translate NamespaceOption.

    Args:
        name: The field's name, for messages.
        message: Unset means all POD, as CRI has it.
        host_supported: Whether pods may use the host's namespaces.
        container: A container may have a PID namespace of its own or another container's; so may a sandbox
            say what its containers are going to have, except for TARGET.

    Raises:
        InvalidArgument: A mode means nothing for its namespace.
        Unimplemented: A mode needs what this version does not do.
    """
    modes = {}
    for which, value in (("network", message.network), ("pid", message.pid), ("ipc", message.ipc)):
        mode = _mode(f"{name}.{which}", value)
        if mode is NamespaceMode.NODE and not host_supported:
            raise Unimplemented(
                f"{name}.{which}: NODE, the host's namespace, needs a host pod, which this version cannot run",
                remedy=f"leave out host{which.upper() if which != 'network' else 'Network'} in the pod, "
                "or give it a RuntimeClass of another runtime",
            )
        if which != "pid" and mode in (NamespaceMode.CONTAINER, NamespaceMode.TARGET):
            raise bad(f"{name}.{which}", mode.name, "has no meaning", remedy="use POD or NODE")
        modes[which] = mode
    if modes["pid"] is NamespaceMode.TARGET:
        if not container:
            raise bad(
                f"{name}.pid", "TARGET", "is for containers, not for a sandbox", remedy="use POD, CONTAINER or NODE"
            )
        required(f"{name}.target_id", message.target_id)
    return Namespaces(
        network=modes["network"],
        pid=modes["pid"],
        ipc=modes["ipc"],
        target_id=text(f"{name}.target_id", message.target_id, limit=NAME_LIMIT),
        user_namespace=user_namespace_from_cri(f"{name}.userns_options", message),
    )


def check_shared_namespaces(name: str, container: Namespaces, pod: Namespaces) -> None:
    """Refuse a container that asks for the host's network or IPC namespace in a pod that has its own.

    POD is what a client that says nothing sends, so it means the pod's, whichever that is.

    Raises:
        InvalidArgument: It asks for another than its pod's.
    """
    for which in ("network", "ipc"):
        if getattr(container, which) is NamespaceMode.NODE and getattr(pod, which) is not NamespaceMode.NODE:
            raise bad(
                f"{name}.{which}",
                "NODE",
                f"is not the sandbox's, which is {getattr(pod, which).name}: containers of a pod share it",
                remedy="ask for it in the sandbox's security context too, so that the pod runs on the host",
            )


def namespaces_to_cri(namespaces: Namespaces) -> cri.NamespaceOption:
    """Translate back, for PodSandboxStatus. The node's user namespace is left out, as kubelet does."""
    return cri.NamespaceOption(
        network=cri.NamespaceMode.ValueType(namespaces.network.value),
        pid=cri.NamespaceMode.ValueType(namespaces.pid.value),
        ipc=cri.NamespaceMode.ValueType(namespaces.ipc.value),
        target_id=namespaces.target_id,
        userns_options=None if namespaces.user_namespace is None else user_namespace_to_cri(namespaces.user_namespace),
    )


def security_from_cri(
    name: str, message: cri.LinuxContainerSecurityContext, *, host_supported: bool
) -> SecurityContext:
    """Translate LinuxContainerSecurityContext.

    Raises:
        InvalidArgument: A field cannot be used, or two contradict each other.
        Unimplemented: A field needs what this version does not do.
    """
    has_user = message.HasField("run_as_user")
    username = text(f"{name}.run_as_username", message.run_as_username, limit=256)
    if has_user and username:
        raise InvalidArgument(
            f"{name}: run_as_user {message.run_as_user.value} and run_as_username {shorten(username)} exclude each other",
            remedy="leave one of them out",
        )
    if ":" in username:
        # The agent reads "user:group"; a name cannot contain the separator (passwd(5)).
        raise bad(f"{name}.run_as_username", username, "contains ':'", remedy="put the group into run_as_group")
    if message.HasField("run_as_group") and not has_user and not username:
        raise bad(
            f"{name}.run_as_group",
            message.run_as_group.value,
            "has no user beside it",
            remedy="set run_as_user or run_as_username as well",
        )
    capabilities = message.capabilities
    groups = f"{name}.supplemental_groups"
    policy = message.supplemental_groups_policy
    if policy not in (cri.Merge, cri.Strict):
        raise bad(
            f"{name}.supplemental_groups_policy",
            int(policy),
            "is not a known policy",
            remedy="use Merge (0) or Strict (1)",
        )
    return SecurityContext(
        run_as_user=_id(f"{name}.run_as_user", message.run_as_user) if has_user else None,
        run_as_group=(_id(f"{name}.run_as_group", message.run_as_group) if message.HasField("run_as_group") else None),
        run_as_username=username,
        supplemental_groups=[
            number(f"{groups}[{i}]", group, high=ID_LIMIT) for i, group in enumerate(message.supplemental_groups)
        ],
        supplemental_groups_strict=policy == cri.Strict,
        add_capabilities=texts(f"{name}.capabilities.add_capabilities", capabilities.add_capabilities),
        drop_capabilities=texts(f"{name}.capabilities.drop_capabilities", capabilities.drop_capabilities),
        add_ambient_capabilities=texts(
            f"{name}.capabilities.add_ambient_capabilities", capabilities.add_ambient_capabilities
        ),
        privileged=message.privileged,
        readonly_rootfs=message.readonly_rootfs,
        no_new_privs=message.no_new_privs,
        masked_paths=_paths(f"{name}.masked_paths", message.masked_paths),
        readonly_paths=_paths(f"{name}.readonly_paths", message.readonly_paths),
        seccomp=_profile(
            f"{name}.seccomp",
            message.seccomp if message.HasField("seccomp") else None,
            f"{name}.seccomp_profile_path",
            message.seccomp_profile_path,
        ),
        apparmor=_profile(
            f"{name}.apparmor",
            message.apparmor if message.HasField("apparmor") else None,
            f"{name}.apparmor_profile",
            message.apparmor_profile,
        ),
        selinux_given=bool(
            message.selinux_options.user
            or message.selinux_options.role
            or message.selinux_options.type
            or message.selinux_options.level
        ),
        namespaces=namespaces_from_cri(
            f"{name}.namespace_options",
            message.namespace_options,
            host_supported=host_supported,
            container=True,
        ),
    )


def _mode(name: str, value: int) -> NamespaceMode:
    try:
        return NamespaceMode(value)
    except ValueError:
        raise bad(
            name, value, "is not a known namespace mode", remedy="use POD (0), CONTAINER (1), NODE (2) or TARGET (3)"
        ) from None


def _id(name: str, value: cri.Int64Value) -> int:
    return number(name, value.value, high=ID_LIMIT)


def _paths(name: str, values: Iterable[str]) -> list[str]:
    return [absolute_path(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _profile(name: str, typed: cri.SecurityProfile | None, old_name: str, old: str) -> SecurityProfile:
    """Read the typed profile or, where a client still sends it, the deprecated string."""
    if typed is None:
        return _old_profile(old_name, old)
    kind = _PROFILE_KINDS.get(typed.profile_type)
    if kind is None:
        raise bad(
            f"{name}.profile_type",
            int(typed.profile_type),
            "is not a known profile type",
            remedy="use RuntimeDefault (0), Unconfined (1) or Localhost (2)",
        )
    if kind != LOCALHOST:
        if typed.localhost_ref:
            raise bad(
                f"{name}.localhost_ref",
                typed.localhost_ref,
                "is given, but the type is not Localhost",
                remedy="leave it out, or set profile_type to Localhost",
            )
        return SecurityProfile(kind=kind)
    return SecurityProfile(kind=kind, path=required(f"{name}.localhost_ref", typed.localhost_ref, limit=4095))


def _old_profile(name: str, value: str) -> SecurityProfile:
    text(name, value, limit=4095)
    if value in ("", UNCONFINED):
        return SecurityProfile(kind=UNCONFINED)
    if value in (RUNTIME_DEFAULT, "docker/default"):
        return SecurityProfile(kind=RUNTIME_DEFAULT)
    if value.startswith("localhost/") and value != "localhost/":
        return SecurityProfile(kind=LOCALHOST, path=value.removeprefix("localhost/"))
    raise bad(name, value, "is not a profile", remedy="use runtime/default, unconfined or localhost/PROFILE")
