"""User namespaces, of pods and of mounts.

A pod has one range of users and one of groups, which begin with 0, as kubelet gives them (KEP-127).
"""

from __future__ import annotations

from collections.abc import Sequence

from vmruntime.cri.translate.checks import ID_LIMIT, bad
from vmruntime.errors import InvalidArgument
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Mount, SecurityContext
from vmruntime.model.sandbox import IdMapping, NamespaceMode, Namespaces, UserNamespace

_ALIKE = "give every container of the pod its sandbox's userns_options"


def user_namespace_from_cri(name: str, message: cri.NamespaceOption) -> UserNamespace | None:
    """Translate userns_options; None: the node's user namespace, which is also meant when nothing is said.

    Raises:
        InvalidArgument: The mode means nothing here, or its mappings cannot be used.
    """
    if not message.HasField("userns_options"):
        return None
    options = message.userns_options
    if options.mode == cri.NODE:
        for field, mappings in (("uids", options.uids), ("gids", options.gids)):
            if mappings:
                raise InvalidArgument(
                    f"{name}.{field}: {len(mappings)} given, but the mode is NODE", remedy="leave them out, or use POD"
                )
        return None
    if options.mode != cri.POD:
        try:
            mode = NamespaceMode(options.mode).name
        except ValueError:
            mode = str(int(options.mode))
        raise bad(f"{name}.mode", mode, "has no meaning", remedy="use POD or NODE")
    return ids_from_cri(f"{name}.uids", options.uids, f"{name}.gids", options.gids)


def ids_from_cri(
    uids_name: str, uids: Sequence[cri.IDMapping], gids_name: str, gids: Sequence[cri.IDMapping]
) -> UserNamespace:
    """Translate the mappings of a user namespace, or of a mount.

    Raises:
        InvalidArgument: There is not exactly one of each, one does not begin with 0, is empty or goes beyond the last id.
    """
    return UserNamespace(uids=_mapping(uids_name, uids), gids=_mapping(gids_name, gids))


def ids_to_cri(mapping: IdMapping) -> list[cri.IDMapping]:
    """Translate back."""
    return [cri.IDMapping(container_id=mapping.container_id, host_id=mapping.host_id, length=mapping.length)]


def user_namespace_to_cri(user: UserNamespace) -> cri.UserNamespace:
    """Translate back."""
    return cri.UserNamespace(mode=cri.POD, uids=ids_to_cri(user.uids), gids=ids_to_cri(user.gids))


def check_sandbox(name: str, namespaces: Namespaces) -> None:
    """Refuse a user namespace beside the host's own namespaces, which it would have no rights in (KEP-127).

    Raises:
        InvalidArgument: They are combined.
    """
    if namespaces.user_namespace is None:
        return
    for which in ("network", "pid", "ipc"):
        if getattr(namespaces, which) is NamespaceMode.NODE:
            raise InvalidArgument(
                f"{name}.userns_options.mode: POD, a user namespace, cannot be combined with {which}: NODE, the host's",
                remedy="leave out hostUsers: false, or the host's namespace",
            )


def check_container(name: str, message: cri.NamespaceOption, given: UserNamespace | None, pod: Namespaces) -> None:
    """Refuse a container whose user namespace is not its pod's; one that says nothing has the pod's.

    Raises:
        InvalidArgument: They differ.
    """
    if message.HasField("userns_options") and given != pod.user_namespace:
        raise InvalidArgument(
            f"{name}: {given or 'NODE'} differs from the sandbox's {pod.user_namespace or 'NODE'}", remedy=_ALIKE
        )


def check_ids(name: str, security: SecurityContext, user: UserNamespace | None) -> None:
    """Refuse ids that the pod's user namespace does not have.

    Raises:
        InvalidArgument: The first such id.
    """
    if user is None:
        return
    groups = [(f"supplemental_groups[{i}]", group) for i, group in enumerate(security.supplemental_groups)]
    wanted = [("run_as_user", security.run_as_user, user.uids)]
    wanted += [(field, gid, user.gids) for field, gid in (("run_as_group", security.run_as_group), *groups)]
    for field, value, mapping in wanted:
        if value is not None and mapping.outside(value) is None:
            raise bad(
                f"{name}.{field}",
                value,
                f"is not in the pod's user namespace, which has 0 to {mapping.length - 1}",
                remedy="use a smaller id, or leave out hostUsers: false",
            )


def check_image_volumes(name: str, mounts: Sequence[Mount], user: UserNamespace | None) -> None:
    """Refuse image volumes with other ids than the pod's: an image's layers are mounted once a pod.

    Raises:
        InvalidArgument: The first such mount.
    """
    for number, mount in enumerate(mounts):
        if mount.image and mount.ids is not None and mount.ids != user:
            raise InvalidArgument(
                f"{name}[{number}].uidMappings: {mount.ids} for an image differs from the sandbox's {user or 'NODE'}",
                remedy="give the sandbox's mappings, or none",
            )


def _mapping(name: str, mappings: Sequence[cri.IDMapping]) -> IdMapping:
    if len(mappings) != 1:
        raise InvalidArgument(
            f"{name} has {len(mappings)} mappings; exactly one is supported", remedy="give one range that begins with 0"
        )
    mapping = mappings[0]
    text = f"{mapping.container_id} {mapping.host_id} {mapping.length}"
    if mapping.container_id != 0:
        raise bad(
            f"{name}[0].container_id",
            mapping.container_id,
            "is not 0, without which a container has no root",
            remedy="begin the range with 0",
        )
    if mapping.length < 1:
        raise bad(
            f"{name}[0].length", mapping.length, "is less than 1", remedy="give a range of 65536 ids, as kubelet does"
        )
    if mapping.host_id + mapping.length - 1 > ID_LIMIT:
        raise bad(f"{name}[0]", text, f"goes beyond the last id, {ID_LIMIT}", remedy="use a lower host_id")
    return IdMapping(container_id=0, host_id=mapping.host_id, length=mapping.length)
