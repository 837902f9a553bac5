"""Who a container's first process runs as."""

from __future__ import annotations

from vmruntime.errors import InvalidArgument
from vmruntime.model.container import SecurityContext
from vmruntime.model.image import ImageConfig


def resolve_user(security: SecurityContext, image: ImageConfig) -> tuple[str, list[int], bool]:
    """Return what the agent needs to find the ids in the container's own /etc/passwd and /etc/group.

    Returns:
        The user as user[:group] by id or name; supplemental groups; whether the groups that /etc/group gives the user
        are added (SupplementalGroupsPolicy Merge).

    Raises:
        InvalidArgument: A group is given without a user.
    """
    groups = list(security.supplemental_groups)
    merge = not security.supplemental_groups_strict
    user = security.run_as_username if security.run_as_user is None else str(security.run_as_user)
    if not user:
        if security.run_as_group is not None:
            raise InvalidArgument.field(
                "config.linux.security_context.run_as_group",
                security.run_as_group,
                "has no user beside it",
                remedy="set run_as_user or run_as_username as well",
            )
        return image.user or "0", groups, merge
    # A user given by the pod replaces the image's user and group together, as in every runtime.
    return user if security.run_as_group is None else f"{user}:{security.run_as_group}", groups, merge
