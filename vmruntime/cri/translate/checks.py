"""Checks of single request fields, each naming the field as it is written in the protocol.

kubelet checks most of this before it calls, but crictl and other clients do not, and what passes here ends up in
file names, resolv.conf, an OCI configuration and a database.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Iterable, Mapping

from vmruntime.errors import InvalidArgument

# Limits far above anything Kubernetes lets through (253 for names, 256 KiB for all annotations of a pod), low enough
# to keep a mistaken client from filling the store.
NAME_LIMIT = 1024
TEXT_LIMIT = 64 * 1024
# Linux refuses one argument or variable of 128 KiB and more (MAX_ARG_STRLEN, execve(2)).
ARGUMENT_LIMIT = 128 * 1024 - 1
MAP_LIMIT = 1024 * 1024
PATH_LIMIT = 4095  # PATH_MAX without the final NUL, path_resolution(7)
LIST_LIMIT = 4096
# -1 as an id means "leave it alone" to the kernel (setuid(2)), so it is nobody's.
ID_LIMIT = 2**32 - 2

_HOST_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_SYSCTL = re.compile(r"[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)+")


def shorten(value: object) -> str:
    """Return a value's text for a message, cut so that an absurd one does not fill it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def bad(name: str, value: object, why: str, *, remedy: str = "") -> InvalidArgument:
    """Build the error for one field, with the value cut to a readable length."""
    return InvalidArgument(f"{name}: {shorten(value)} {why}", remedy=remedy)


def missing(name: str) -> InvalidArgument:
    """Build the error for a field that must be set."""
    return InvalidArgument(f"{name} is required")


def text(name: str, value: str, *, limit: int = TEXT_LIMIT) -> str:
    """Return a string that holds no NUL and is not absurdly long.

    Raises:
        InvalidArgument: It does, or is.
    """
    if len(value) > limit:
        raise InvalidArgument(f"{name} has {len(value)} characters; at most {limit} are allowed")
    if "\0" in value:
        raise bad(name, value, "contains a NUL character")
    return value


def required(name: str, value: str, *, limit: int = NAME_LIMIT) -> str:
    """Return a string that is not empty either.

    Raises:
        InvalidArgument: It is empty, too long or contains NUL.
    """
    if not value:
        raise missing(name)
    return text(name, value, limit=limit)


def texts(name: str, values: Iterable[str], *, limit: int = TEXT_LIMIT) -> list[str]:
    """Return a list of strings, each checked under its index."""
    found = [text(f"{name}[{i}]", value, limit=limit) for i, value in enumerate(values)]
    if len(found) > LIST_LIMIT:
        raise InvalidArgument(f"{name} has {len(found)} entries; at most {LIST_LIMIT} are allowed")
    return found


def text_map(name: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return labels, annotations and the like, unchanged.

    Raises:
        InvalidArgument: A key or value contains NUL, or all together are larger than 1 MiB.
    """
    total = 0
    for key, value in values.items():
        if "\0" in key or "\0" in value:
            raise InvalidArgument(f"{name}[{shorten(key)}] contains a NUL character")
        total += len(key) + len(value)
    if total > MAP_LIMIT:
        raise InvalidArgument(f"{name} has {total} characters in all; at most {MAP_LIMIT} are allowed")
    return dict(values)


def number(name: str, value: int, *, low: int = 0, high: int = 2**63 - 1) -> int:
    """Return an integer within its bounds.

    Raises:
        InvalidArgument: It is not.
    """
    if value < low:
        raise bad(name, value, "is negative" if low == 0 else f"is less than {low}")
    if value > high:
        raise bad(name, value, f"is more than {high}")
    return value


def absolute_path(name: str, value: str) -> str:
    """Return an absolute path without `..`, as given.

    Raises:
        InvalidArgument: It is empty, relative, or climbs.
    """
    required(name, value, limit=PATH_LIMIT)
    if not value.startswith("/"):
        raise bad(name, value, "is not an absolute path", remedy="begin it with /")
    if ".." in value.split("/"):
        raise bad(name, value, "contains '..'", remedy="write the path without it")
    return value


def joined_path(directory: str, name: str, value: str) -> str:
    """Return `value` below `directory`.

    Raises:
        InvalidArgument: It is absolute, names the directory itself, or leads out of it.
    """
    text(name, value, limit=PATH_LIMIT)
    if value.startswith("/"):
        raise bad(name, value, "must be relative to the sandbox's log directory")
    if ".." in value.split("/"):
        raise bad(name, value, "contains '..', which would lead out of the sandbox's log directory")
    path = posixpath.normpath(value)
    if path == "." or value.endswith("/"):
        raise bad(name, value, "does not name a file")
    return posixpath.join(directory, path)


def ip_address(name: str, value: str) -> str:
    """Return an IPv4 or IPv6 address, as given.

    Raises:
        InvalidArgument: It is neither.
    """
    try:
        ipaddress.ip_address(value)
    except ValueError:
        raise bad(name, value, "is not an IP address") from None
    return value


def resolv_word(name: str, value: str) -> str:
    """Return one word for a line of resolv.conf(5).

    Raises:
        InvalidArgument: It is empty or contains a space or control character, which would start another word or line.
    """
    required(name, value)
    if any(c.isspace() or not c.isprintable() for c in value):
        raise bad(name, value, "contains a space or control character")
    return value


def hostname(name: str, value: str) -> str:
    """Return a host name (RFC 1123 labels, at most 64 characters as in sethostname(2)).

    Raises:
        InvalidArgument: It is not one.
    """
    if len(value) > 64:
        raise bad(name, value, f"has {len(value)} characters; Linux allows 64")
    if not all(_HOST_LABEL.fullmatch(label) for label in value.split(".")):
        raise bad(name, value, "is not a host name (RFC 1123: letters, digits, '-' and '.')")
    return value


def sysctl_name(name: str, value: str) -> str:
    """Return a sysctl's name in dotted form; sysctl(8) takes either separator, whichever comes first.

    Raises:
        InvalidArgument: It is not a sysctl name.
    """
    text(name, value, limit=NAME_LIMIT)
    if not _SYSCTL.fullmatch(value):
        raise bad(name, value, "is not a sysctl name", remedy="write it like net.ipv4.ip_forward")
    slash, dot = value.find("/"), value.find(".")
    if slash >= 0 and (dot < 0 or slash < dot):
        return value.translate(str.maketrans("./", "/."))
    return value
