"""cloud-init's user-data: what the pod asks for, and what the pod's environment, files and volumes need."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Sequence
from typing import Any

from vmruntime import yamltext
from vmruntime.errors import InvalidArgument
from vmruntime.seed import sources
from vmruntime.seed.merge import merge
from vmruntime.seed.network import route_commands
from vmruntime.seed.paths import absolute
from vmruntime.seed.request import SeedDevice, SeedFile, SeedMount, SeedRequest
from vmruntime.seed.scripts import device_script, mount_script

HEADER = "#cloud-config\n"
MOUNT_SCRIPT_MARK = "@virtlet-mount-script@"

# Virtlet's places.
ENVIRONMENT = "/etc/cloud/environment"
DEVICE_SCRIPT = "/etc/cloud/symlink-devs.sh"
MOUNT_SCRIPT = "/etc/cloud/mount-volumes.sh"
PER_BOOT = "/var/lib/cloud/scripts/per-boot/"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


def user_data(request: SeedRequest) -> tuple[str, str]:
    """Return user-data, and vendor-data where user-data is the pod's own script or document; else that is empty.

    cloud-init reads vendor-data as cloud-config beside any form of user-data, so that files and mounts are not lost.

    Raises:
        NotFound: A source lacks a key.
        InvalidArgument: Something cannot be used; the message names it.
    """
    mounts = [_mount(mount) for mount in request.mounts]
    devices = [_device(device) for device in request.devices]
    script = _script(request)
    if not script:
        return _text(_generated(request, mounts, devices, _given(request))), ""
    commands = "\n".join(part for part in (device_script(devices), mount_script(mounts)) if part)
    vendor = _generated(request, mounts, devices, {})
    return script.replace(MOUNT_SCRIPT_MARK, commands), _text(vendor) if vendor else ""


def environment(envs: Sequence[tuple[str, str]]) -> str:
    """Return variables as lines that environment files of PAM and systemd have, and that a shell can read too.

    Raises:
        InvalidArgument: A name is none.
    """
    for name, _ in envs:
        if _NAME.fullmatch(name) is None:
            raise InvalidArgument.field(
                "envs", name, "is not the name of a variable", remedy="use letters, digits and _"
            )
    return "".join(f"{name}={shlex.quote(value) if value else ''}\n" for name, value in envs)


def _script(request: SeedRequest) -> str:
    """Return what is to be the whole of user-data; the annotation wins over its source."""
    pod = request.image_pod
    if pod.user_data_script:
        return pod.user_data_script
    if pod.user_data_source is not None and pod.user_data_source.key and request.user_data is not None:
        return sources.document(pod.user_data_source, request.user_data, pod.user_data_encoding)
    return ""


def _given(request: SeedRequest) -> dict[str, Any]:
    pod = request.image_pod
    source = {}
    if pod.user_data_source is not None and request.user_data is not None:
        source = sources.cloud_config(pod.user_data_source, request.user_data)
    if pod.user_data is None:
        return source
    joined: dict[str, Any] = pod.user_data if pod.user_data_overwrite else merge(source, pod.user_data)
    return joined


def _generated(
    request: SeedRequest, mounts: Sequence[SeedMount], devices: Sequence[SeedDevice], given: dict[str, Any]
) -> dict[str, Any]:
    """Return cloud-config with everything the pod needs behind what was given."""
    config = dict(given)
    own_mounts = [_renamed(entry, devices) for entry in _list("mounts", given)]
    # All six fields, since cloud-init's default options are for disks. passno 0: no fsck of what is a share.
    fstab = [[mount.source, mount.path, mount.fstype, mount.options or "defaults", "0", "0"] for mount in mounts]
    if own_mounts or fstab:
        config["mounts"] = [*own_mounts, *fstab]
    files = [_entry(file, mounts) for file in _files(request)]
    routes = [] if request.network is None or request.image_pod.force_dhcp else route_commands(request.network)
    if routes:
        config["bootcmd"] = [*routes, *_list("bootcmd", given)]
    if devices:
        files.append(_plain(DEVICE_SCRIPT, device_script(devices), "0755"))
        commands = [[DEVICE_SCRIPT], ["ln", "-sf", DEVICE_SCRIPT, PER_BOOT]]
        config["runcmd"] = [*commands, *_list("runcmd", given)]
    if mounts:
        files.append(_plain(MOUNT_SCRIPT, mount_script(mounts), "0755"))
    if request.envs:
        files.append(_plain(ENVIRONMENT, environment(request.envs), "0644"))
    if files:
        config["write_files"] = [*_list("write_files", given), *files]
    return config


def _list(name: str, config: dict[str, Any]) -> list[Any]:
    value = config.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArgument(
            f"user-data: {name} is {yamltext.kind(value)}, not a list", remedy="write it as cloud-init's manual shows"
        )
    return value


def _renamed(entry: Any, devices: Sequence[SeedDevice]) -> Any:
    """Mounts are made before names of block volumes are, so an entry that has such a name gets the device itself."""
    if isinstance(entry, list) and entry:
        for device in devices:
            if entry[0] == device.path:
                return [device.source, *entry[1:]]
    return entry


def _files(request: SeedRequest) -> list[SeedFile]:
    files = list(request.injected)
    source = request.image_pod.files_source
    if source is not None and request.files is not None:
        files += sources.files(source, request.files)
    return files


def _entry(file: SeedFile, mounts: Sequence[SeedMount]) -> dict[str, Any]:
    path = absolute("file", file.path)
    entry = {
        "path": path,
        "encoding": "b64",
        "content": base64.b64encode(file.content).decode(),
        "permissions": f"{file.mode & 0o7777:04o}",
    }
    # Written before mounts are made, it would be hidden by one.
    if not file.covered and any(path.startswith(f"{mount.path}/") for mount in mounts):
        return {**entry, "defer": True}
    return entry


def _plain(path: str, content: str, permissions: str) -> dict[str, Any]:
    return {"path": path, "content": content, "permissions": permissions}


def _mount(mount: SeedMount) -> SeedMount:
    for name, word in (("source", mount.source), ("fstype", mount.fstype), ("options", mount.options)):
        if not word.isprintable() or any(c.isspace() for c in word) or (not word and name != "options"):
            raise InvalidArgument.field(f"mount {mount.path}: {name}", word, "cannot be written into fstab")
    path = absolute("mount", mount.path, word=True)
    return SeedMount(source=mount.source, path=path, fstype=mount.fstype, options=mount.options)


def _device(device: SeedDevice) -> SeedDevice:
    return SeedDevice(path=absolute("device", device.path), source=absolute("device", device.source))


def _text(config: dict[str, Any]) -> str:
    return HEADER + (yamltext.dump(config) if config else "")
