"""The Container Device Interface: files in which vendors say what a container needs for their devices.

Versions 0.3.0 to 1.0.0 of the specification (cncf-tags/container-device-interface, SPEC.md), as JSON or YAML. No file is
read here; vmruntime/daemon/cdi.py does that.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from vmruntime.errors import FailedPrecondition, NotFound
from vmruntime.model.container import ContainerEdits, Device, Mount
from vmruntime.pods.oci.hooks import Stage

VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0")
FIELD = "config.CDI_devices"
MANUAL = "see https://github.com/cncf-tags/container-device-interface"

_KIND = re.compile(r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?")
_ACCESS = re.compile(r"[rwm]{1,3}")
_PROPAGATION = {
    "private": "private",
    "rprivate": "private",
    "slave": "rslave",
    "rslave": "rslave",
    "shared": "rshared",
    "rshared": "rshared",
}
# What a bind mount is anyway, or says of itself in other words.
_IMPLIED = frozenset({"bind", "rbind", "rw", "defaults"})
_OPTIONS = frozenset({"nosuid", "nodev", "noexec", "suid", "dev", "exec", "noatime", "nodiratime", "relatime"})
_MORE_MESSAGES = 3


class _DeviceNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    path: str
    host_path: str = ""
    type: Literal["", "b", "c", "u", "p"] = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = "rwm"
    uid: int | None = None
    gid: int | None = None


class _Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    host_path: str
    container_path: str
    options: list[str] = []
    type: str = ""


class _Hook(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    hook_name: Stage
    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: int | None = None


class _Edits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    env: list[str] = []
    device_nodes: list[_DeviceNode] = msgspec.field(name="deviceNodes", default_factory=list)
    mounts: list[_Mount] = []
    hooks: list[_Hook] = []
    intel_rdt: Any = msgspec.field(name="intelRdt", default=None)
    groups: list[int] = msgspec.field(name="additionalGIDs", default_factory=list)


class _Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    name: str
    annotations: dict[str, str] = {}
    container_edits: _Edits = _Edits()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    cdi_version: str
    kind: str
    devices: list[_Device]
    annotations: dict[str, str] = {}
    container_edits: _Edits = _Edits()


class _Version(msgspec.Struct, rename="camel"):
    cdi_version: str


class CdiSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One file.

    Attributes:
        path: Where it is, for messages.
        priority: Of its directory; a higher one wins.
    """

    path: str
    priority: int
    content: _File


class CdiSpecs(msgspec.Struct, frozen=True, kw_only=True):
    """All files, and what is wrong with those that cannot be used."""

    specs: Sequence[CdiSpec] = ()
    bad: Sequence[str] = ()
    directories: Sequence[str] = ()


def parse(text: bytes, path: str, priority: int = 0) -> CdiSpec:
    """Read one file; its name says whether it is JSON or YAML.

    Raises:
        FailedPrecondition: It is no CDI file; the message names the file and the field.
    """
    decode = msgspec.json.decode if path.endswith(".json") else msgspec.yaml.decode
    try:
        version = decode(text, type=_Version).cdi_version
        if version not in VERSIONS:
            raise _bad(path, "cdiVersion", f"{version!r} is not one of {', '.join(VERSIONS)}")
        content = decode(text, type=_File)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise _bad(path, place.strip("`.") or "file", reason[:1].lower() + reason[1:]) from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _bad(path, "file", f"not readable: {' '.join(str(error).split())[:200]}") from None
    _check(path, content)
    return CdiSpec(path=path, priority=priority, content=content)


def resolve(names: Sequence[str], found: CdiSpecs) -> ContainerEdits:
    """Return what the devices of these names change, in their order; what a file says for all its devices comes once, first.

    Of two files with a device of the same name that of the directory with the higher priority counts.

    Raises:
        NotFound: A name is no device's; the message says where was looked.
        FailedPrecondition: Two files of equal priority name the same device, or it needs what cannot be had.
    """
    edits = ContainerEdits()
    used: set[str] = set()
    for number, name in enumerate(dict.fromkeys(names)):
        field = f"{FIELD}[{number}].name: {name!r}"
        spec, device = _find(field, name, found)
        if spec.path not in used:
            used.add(spec.path)
            edits = _added(edits, _translate(field, spec, spec.content.container_edits))
        edits = _added(edits, _translate(field, spec, device.container_edits))
    return edits


def _find(field: str, name: str, found: CdiSpecs) -> tuple[CdiSpec, _Device]:
    kind, _, wanted = name.partition("=")
    candidates = [
        (spec, device)
        for spec in found.specs
        if spec.content.kind == kind
        for device in spec.content.devices
        if device.name == wanted
    ]
    highest = max((spec.priority for spec, _ in candidates), default=0)
    best = [(spec, device) for spec, device in candidates if spec.priority == highest]
    if not best:
        unusable = "; ".join(found.bad[:_MORE_MESSAGES])
        raise NotFound(
            f"{field} is no device of a CDI file in {', '.join(found.directories) or 'any directory'}"
            + (f"; files that cannot be used: {unusable}" if unusable else ""),
            remedy="install the vendor's CDI file, or set cdi_spec_dirs",
        )
    if len(best) > 1:
        raise FailedPrecondition(
            f"{field} is in two CDI files of the same directory: {best[0][0].path} and {best[1][0].path}",
            remedy="remove one of them",
        )
    return best[0]


def _added(one: ContainerEdits, other: ContainerEdits) -> ContainerEdits:
    hooks = {stage: [*one.hooks.get(stage, []), *other.hooks.get(stage, [])] for stage in {**one.hooks, **other.hooks}}
    return ContainerEdits(
        envs=[*one.envs, *other.envs],
        mounts=[*one.mounts, *other.mounts],
        devices=[*one.devices, *other.devices],
        groups=[*one.groups, *other.groups],
        hooks=hooks,
    )


def _translate(field: str, spec: CdiSpec, edits: _Edits) -> ContainerEdits:
    if edits.intel_rdt is not None:
        raise FailedPrecondition(
            f"{field} asks for intelRdt (in {spec.path}), which this runtime does not set",
            remedy="take it out of the file",
        )
    hooks: dict[str, list[dict[str, Any]]] = {}
    for hook in edits.hooks:
        entry = {"path": hook.path, "args": hook.args, "env": hook.env, "timeout": hook.timeout}
        hooks.setdefault(hook.hook_name, []).append({key: value for key, value in entry.items() if value})
    return ContainerEdits(
        envs=[(name, value) for name, _, value in (entry.partition("=") for entry in edits.env)],
        mounts=[_mount(field, mount) for mount in edits.mounts],
        devices=[_device(field, node) for node in edits.device_nodes],
        groups=[group for group in edits.groups if group],  # 0 means nothing, as in the reference implementation
        hooks=hooks,
    )


def _mount(field: str, mount: _Mount) -> Mount:
    # The last one of two that exclude each other counts, as in mount(8).
    propagation = [_PROPAGATION[option] for option in mount.options if option in _PROPAGATION]
    return Mount(
        field=f"{field}: hostPath",
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly="ro" in mount.options,
        propagation=propagation[-1] if propagation else "private",
        options=[option for option in mount.options if option in _OPTIONS],
        must_exist=True,
    )


def _device(field: str, node: _DeviceNode) -> Device:
    return Device(
        field=field,
        container_path=node.path,
        host_path=node.host_path or node.path,
        permissions=node.permissions,
        type="c" if node.type == "u" else node.type,
        major=node.major,
        minor=node.minor,
        mode=None if node.file_mode is None else node.file_mode & 0o7777,
        uid=node.uid,
        gid=node.gid,
        users=True,
    )


def _check(path: str, content: _File) -> None:
    """Refuse what the types cannot say."""
    if not _KIND.fullmatch(content.kind):
        raise _bad(path, "kind", f"{content.kind[:100]!r} is not vendor/class")
    if not content.devices:
        raise _bad(path, "devices", "there is none")
    _check_edits(path, "containerEdits", content.container_edits)
    seen: set[str] = set()
    for number, device in enumerate(content.devices):
        place = f"devices[{number}]"
        if not _NAME.fullmatch(device.name):
            raise _bad(path, f"{place}.name", f"{device.name[:100]!r} is not a device's name")
        if device.name in seen:
            raise _bad(path, f"{place}.name", f"{device.name!r} is there twice")
        seen.add(device.name)
        _check_edits(path, f"{place}.containerEdits", device.container_edits)


def _check_edits(path: str, place: str, edits: _Edits) -> None:
    _check_variables(path, f"{place}.env", edits.env)
    for number, node in enumerate(edits.device_nodes):
        _check_node(path, f"{place}.deviceNodes[{number}]", node)
    for number, mount in enumerate(edits.mounts):
        _check_mount(path, f"{place}.mounts[{number}]", mount)
    for number, hook in enumerate(edits.hooks):
        field = f"{place}.hooks[{number}]"
        _check_path(path, f"{field}.path", hook.path)
        _check_variables(path, f"{field}.env", hook.env)
        if hook.timeout is not None and hook.timeout <= 0:
            raise _bad(path, f"{field}.timeout", f"{hook.timeout} is not a positive number of seconds")
    for number, group in enumerate(edits.groups):
        _check_number(path, f"{place}.additionalGIDs[{number}]", group)


def _check_node(path: str, place: str, node: _DeviceNode) -> None:
    _check_path(path, f"{place}.path", node.path)
    if node.host_path:
        _check_path(path, f"{place}.hostPath", node.host_path)
    if not _ACCESS.fullmatch(node.permissions):
        raise _bad(path, f"{place}.permissions", f"{node.permissions[:20]!r} is not made of the letters r, w and m")
    for name, value in (("uid", node.uid), ("gid", node.gid), ("fileMode", node.file_mode)):
        if value is not None:
            _check_number(path, f"{place}.{name}", value)
    for name, number in (("major", node.major), ("minor", node.minor)):
        _check_number(path, f"{place}.{name}", number)


def _check_mount(path: str, place: str, mount: _Mount) -> None:
    _check_path(path, f"{place}.hostPath", mount.host_path)
    _check_path(path, f"{place}.containerPath", mount.container_path)
    if mount.type not in ("", "none", "bind", "rbind"):
        raise _bad(path, f"{place}.type", f"{mount.type[:100]!r} is not supported; only bind mounts are")
    for option in mount.options:
        if option not in _OPTIONS and option not in _IMPLIED and option not in _PROPAGATION and option != "ro":
            raise _bad(path, f"{place}.options", f"{option[:100]!r} is not a supported option of bind mounts")


def _check_variables(path: str, place: str, entries: Iterable[str]) -> None:
    for number, entry in enumerate(entries):
        if "=" not in entry or entry.startswith("=") or "\0" in entry:
            raise _bad(path, f"{place}[{number}]", "is not NAME=value")


def _check_path(path: str, place: str, value: str) -> None:
    if not posixpath.isabs(value) or "\0" in value or ".." in value.split("/"):
        raise _bad(path, place, f"{value[:200]!r} is not an absolute path without '..'")


def _check_number(path: str, place: str, value: int) -> None:
    if not 0 <= value < 2**32 - 1:
        raise _bad(path, place, f"{value} is out of range")


def _bad(path: str, place: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"{path}: {place}: {why}", remedy=MANUAL)
