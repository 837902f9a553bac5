"""Seccomp filters: the default profile, and profiles from the host.

A profile is the OCI configuration's linux.seccomp, with Docker's additions, which profiles found in the wild use:
`archMap` instead of `architectures`, and rules under `includes` or `excludes` conditions on capabilities and machine.
What leaves here is plain OCI. (seccomp(2); opencontainers/runtime-spec config-linux.md)
"""

from __future__ import annotations

import functools
import importlib.resources
import posixpath
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from vmruntime.errors import InvalidArgument, VmruntimeError
from vmruntime.model.container import SecurityProfile

_FIELD = "config.linux.security_context.seccomp"
_PROFILE_LIMIT = 1024 * 1024

# machine: (name in Docker's conditions, libseccomp architectures with the 32-bit ones its kernel runs)
_ARCHITECTURES = {
    "x86_64": ("amd64", ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
    "aarch64": ("arm64", ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
}


class _Condition(msgspec.Struct, frozen=True):
    """When a rule counts. Kernel versions are taken for met: the guest's is ours and recent."""

    caps: list[str] = []
    arches: list[str] = []


class _Argument(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    index: int
    value: int
    op: str
    value_two: int = 0


class _Rule(msgspec.Struct, frozen=True, rename="camel"):
    action: str
    names: list[str] = []
    name: str = ""  # older profiles have one name a rule
    errno_ret: int | None = None
    args: list[_Argument] | None = None
    includes: _Condition = _Condition()
    excludes: _Condition = _Condition()


class _ArchMap(msgspec.Struct, frozen=True, rename="camel"):
    architecture: str
    sub_architectures: list[str] | None = None


class _Profile(msgspec.Struct, frozen=True, rename="camel"):
    default_action: str
    default_errno_ret: int | None = None
    architectures: list[str] = []
    arch_map: list[_ArchMap] = []
    flags: list[str] = []
    listener_path: str = ""
    syscalls: list[_Rule] | None = None


def seccomp_filter(
    profile: SecurityProfile,
    capabilities: Iterable[str],
    architecture: str,
    load_profile: Callable[[str], bytes],
) -> dict[str, Any] | None:
    """Return linux.seccomp for a profile; None: unconfined.

    Args:
        profile: The kind, and the path for "localhost".
        capabilities: The container's bounding set; a rule may depend on it.
        architecture: The guest's machine, x86_64 or aarch64.
        load_profile: Reads a file of this host; called with an absolute, normal path; kubelet's are below its root directory.

    Raises:
        InvalidArgument: The profile's path or content cannot be used.
    """
    if profile.kind == "unconfined":
        return None
    if profile.kind == "runtime/default":
        return _resolve(default_profile(), set(capabilities), architecture)
    if profile.kind != "localhost":
        remedy = "use runtime/default, unconfined or localhost"
        raise InvalidArgument.field(_FIELD, profile.kind[:64], "is not a known kind of profile", remedy=remedy)
    path = _checked_path(profile.path)
    try:
        text = load_profile(path)
    except VmruntimeError:
        raise
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}", "put the profile there") from error
    return _resolve(_parse(text, path), set(capabilities), architecture)


@functools.cache
def default_profile() -> _Profile:
    """Return the profile RuntimeDefault stands for."""
    file = importlib.resources.files("vmruntime.pods.oci") / "seccomp_default.json"
    return msgspec.json.decode(file.read_bytes(), type=_Profile)


def _checked_path(path: str) -> str:
    """Return the path in its shortest form."""
    if not path.startswith("/") or "\0" in path or len(path) > 4095:
        raise _unusable(path, "is not an absolute path", "give the profile's path on this host, as kubelet does")
    if ".." in path.split("/"):
        raise _unusable(path, "has '..' in it", "write the path without it")
    return posixpath.normpath(path)


def _parse(text: bytes, path: str) -> _Profile:
    if len(text) > _PROFILE_LIMIT:
        raise _unusable(path, f"has {len(text)} bytes", f"at most {_PROFILE_LIMIT} are read")
    try:
        profile = msgspec.json.decode(text, type=_Profile)
    except msgspec.MsgspecError as error:
        raise _unusable(path, f"is no profile: {error}", "see linux.seccomp of the OCI runtime specification") from None
    except RecursionError:
        raise _unusable(path, "is nested too deeply", "see linux.seccomp of the OCI runtime specification") from None
    actions = [profile.default_action, *(rule.action for rule in profile.syscalls or [])]
    for action in actions:
        if not action.startswith("SCMP_ACT_"):
            raise _unusable(path, f"has the action {action[:64]!r}", "actions are SCMP_ACT_ALLOW, SCMP_ACT_ERRNO, …")
    if profile.listener_path or "SCMP_ACT_NOTIFY" in actions:
        raise _unusable(path, "wants a listener on the host", "take SCMP_ACT_NOTIFY and listenerPath out of it")
    return profile


def _unusable(path: str, why: str, remedy: str) -> InvalidArgument:
    return InvalidArgument.field(f"{_FIELD}.localhost_ref", path[:256], why, remedy=remedy)


def _resolve(profile: _Profile, capabilities: set[str], architecture: str) -> dict[str, Any]:
    docker_name, known = _ARCHITECTURES.get(architecture, ("", []))
    found: dict[str, Any] = {"defaultAction": profile.default_action}
    if profile.default_errno_ret is not None:
        found["defaultErrnoRet"] = profile.default_errno_ret
    if architectures := _architectures(profile, known):
        found["architectures"] = architectures
    if profile.flags:
        found["flags"] = list(profile.flags)
    found["syscalls"] = [
        _rule_to_oci(rule)
        for rule in profile.syscalls or []
        # libseccomp refuses a rule that says what the default says anyway.
        if (rule.action, rule.errno_ret) != (profile.default_action, profile.default_errno_ret)
        and _counts(rule, capabilities, docker_name)
    ]
    return found


def _architectures(profile: _Profile, known: list[str]) -> list[str]:
    if profile.architectures:
        return list(profile.architectures)
    for entry in profile.arch_map:
        if known and entry.architecture == known[0]:
            return [entry.architecture, *(entry.sub_architectures or [])]
    return []


def _counts(rule: _Rule, capabilities: set[str], docker_name: str) -> bool:
    includes, excludes = rule.includes, rule.excludes
    if any(cap not in capabilities for cap in includes.caps):
        return False
    if includes.arches and docker_name not in includes.arches:
        return False
    return docker_name not in excludes.arches and not any(cap in capabilities for cap in excludes.caps)


def _rule_to_oci(rule: _Rule) -> dict[str, Any]:
    found: dict[str, Any] = {"names": [*rule.names, *([rule.name] if rule.name else [])], "action": rule.action}
    if rule.errno_ret is not None:
        found["errnoRet"] = rule.errno_ret
    if rule.args:
        found["args"] = msgspec.to_builtins(rule.args)
    return found
