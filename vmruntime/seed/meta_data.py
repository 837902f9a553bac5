"""cloud-init's meta-data, as JSON, which is YAML too: small readers such as CirrOS's know only that."""

from __future__ import annotations

from typing import Any

import msgspec

from vmruntime.model.image_pod import SeedFormat
from vmruntime.seed import sources
from vmruntime.seed.request import SeedRequest


def meta_data(request: SeedRequest) -> bytes:
    """Return meta-data: instance-id, local-hostname, public-keys, and what the pod adds or replaces.

    ConfigDrive has uuid, hostname and public_keys as well, OpenStack's names for the same (cloud-init reads those).

    Raises:
        NotFound: The source of SSH keys lacks the key.
        InvalidArgument: A line of it is no public key.
    """
    given = request.image_pod.meta_data
    members: dict[str, Any] = {"instance-id": request.instance_id, "local-hostname": request.hostname}
    public = public_keys(request)
    if public:
        members["public-keys"] = public
    members |= given
    if request.image_pod.seed_format is SeedFormat.CONFIGDRIVE:
        members.setdefault("uuid", members["instance-id"])
        members.setdefault("hostname", members["local-hostname"])
        if isinstance(members.get("public-keys"), list):
            named = {f"key-{number}": key for number, key in enumerate(members["public-keys"])}
            members.setdefault("public_keys", named)
    return msgspec.json.format(msgspec.json.encode(members), indent=1) + b"\n"


def public_keys(request: SeedRequest) -> list[str]:
    """Return the SSH keys of the pod's source and of its annotation; with overwrite, only the latter where it has some."""
    pod = request.image_pod
    found: list[str] = []
    if (
        pod.ssh_key_source is not None
        and request.ssh_keys is not None
        and not (pod.user_data_overwrite and pod.ssh_keys)
    ):
        found = sources.keys(pod.ssh_key_source, request.ssh_keys)
    return list(dict.fromkeys([*found, *pod.ssh_keys]))
