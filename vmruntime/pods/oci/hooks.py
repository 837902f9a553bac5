"""OCI hooks by conditions: the files of oci-hooks(5), version 1.0.0, and what of them a container gets.

No file is read here; vmruntime/daemon/hooks.py does that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import msgspec
import re2

from vmruntime.errors import FailedPrecondition

VERSION = "1.0.0"
MANUAL = "see oci-hooks(5)"

Stage = Literal["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]

IN_CONTAINER: Stage = "startContainer"
"""The one stage whose program is looked up, and runs, inside the container (OCI runtime specification, config.md)."""

# Patterns meet what a pod's author wrote: RE2's time is linear in the text, whatever the pattern.
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What runs: an entry of the OCI specification's hooks.

    Attributes:
        args: As execv(3) has them, the program's name first.
        timeout: Seconds.
    """

    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: int | None = None


class When(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """All conditions that are given have to match; patterns may match anywhere in a text."""

    always: bool | None = None
    annotations: dict[str, str] = {}
    commands: list[str] = []
    has_bind_mounts: bool | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: str
    hook: Command
    when: When
    stages: list[Stage]


class Hook(msgspec.Struct, frozen=True, kw_only=True):
    """One hook.

    Attributes:
        file: Where it is written, for messages.
    """

    file: str
    command: Command
    when: When
    stages: list[Stage]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What of a container the conditions are about.

    Attributes:
        annotations: The container's and its pod's.
        program: The first word of what it runs.
        bind_mounts: Whether it has volumes of the host.
    """

    annotations: Mapping[str, str]
    program: str
    bind_mounts: bool


def parse(text: bytes, file: str) -> Hook:
    """Read one file.

    Raises:
        FailedPrecondition: It is no hook; the message names the file and the field.
    """
    try:
        version = msgspec.json.decode(text, type=_Version).version
    except msgspec.ValidationError as error:
        raise _bad(file, *_place(str(error))) from None
    except msgspec.DecodeError as error:
        raise FailedPrecondition(f"{file}: not JSON: {error}", remedy=MANUAL) from None
    if version != VERSION:
        raise _bad(file, "version", f"{version!r} is not {VERSION!r}")
    try:
        found = msgspec.json.decode(text, type=_File)
    except msgspec.ValidationError as error:
        raise _bad(file, *_place(str(error))) from None
    hook = Hook(file=file, command=found.hook, when=found.when, stages=list(dict.fromkeys(found.stages)))
    _check(hook)
    return hook


class _Version(msgspec.Struct):
    version: str


def _place(words: str) -> tuple[str, str]:
    """Split msgspec's words into the field and what is wrong with it."""
    reason, _, place = words.partition(" - at `$")
    return place.strip("`.") or "file", reason[:1].lower() + reason[1:]


def _check(hook: Hook) -> None:
    """Refuse what the types cannot say."""
    command, when = hook.command, hook.when
    if not PurePosixPath(command.path).is_absolute() or "\0" in command.path:
        raise _bad(hook.file, "hook.path", f"{command.path!r} is not an absolute path")
    for number, entry in enumerate(command.env):
        if "=" not in entry or entry.startswith("="):
            raise _bad(hook.file, f"hook.env[{number}]", f"{entry!r} is not NAME=value")
    if command.timeout is not None and command.timeout <= 0:
        raise _bad(hook.file, "hook.timeout", f"{command.timeout} is not a positive number of seconds")
    if not hook.stages:
        raise _bad(hook.file, "stages", "[] names no stage, so it would never run")
    if when == When():
        raise _bad(hook.file, "when", "{} has no condition, so it would never run")
    for key, value in when.annotations.items():
        _compile(hook.file, "when.annotations", key)
        _compile(hook.file, f"when.annotations[{key!r}]", value)
    for number, pattern in enumerate(when.commands):
        _compile(hook.file, f"when.commands[{number}]", pattern)


def _compile(file: str, field: str, pattern: str) -> Any:
    """Return a compiled pattern; the library keeps those that were used last."""
    try:
        return re2.compile(pattern, options=_OPTIONS)
    except re2.error as error:
        why = error.args[0].decode(errors="replace")
        raise _bad(file, field, f"{pattern!r} is not a regular expression of RE2: {why}") from None


def _bad(file: str, field: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"{file}: {field}: {why}", remedy=MANUAL)


def matches(hook: Hook, subject: Subject) -> bool:
    """Whether every condition of a hook that is given matches a container."""
    when = hook.when

    def search(pattern: str, text: str) -> bool:
        return _compile(hook.file, "when", pattern).search(text) is not None

    return (
        when.always in (None, True)
        and (when.has_bind_mounts is None or (when.has_bind_mounts and subject.bind_mounts))
        and all(
            any(search(key, name) and search(value, content) for name, content in subject.annotations.items())
            for key, value in when.annotations.items()
        )
        and (not when.commands or any(search(pattern, subject.program) for pattern in when.commands))
    )


def outside(hook: Hook) -> list[Stage]:
    """Return the stages of a hook whose program runs outside of the container."""
    return [stage for stage in hook.stages if stage != IN_CONTAINER]


def oci_hooks(hooks: Iterable[Hook], stages: Sequence[Stage]) -> dict[str, Any]:
    """Return the member "hooks" of an OCI configuration, with some stages; hooks run in the order given."""
    member: dict[str, Any] = {}
    for hook in hooks:
        for stage in hook.stages:
            if stage in stages:
                member.setdefault(stage, []).append(msgspec.to_builtins(_entry(hook.command)))
    return member


def _entry(command: Command) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": command.path}
    if command.args:
        entry["args"] = command.args
    if command.env:
        entry["env"] = command.env
    if command.timeout is not None:
        entry["timeout"] = command.timeout
    return entry
