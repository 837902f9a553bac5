"""A configuration made from a template once kubelet tells the node's pod CIDR, for clusters whose network is routed by CIDRs.

Like containerd's conf_template, and under the same condition: only while nobody else has put a configuration there.
"""

from __future__ import annotations

import ipaddress
import json
import os
import string
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vmruntime.errors import ResourceExhausted
from vmruntime.network.conf import NetworkConf, parse
from vmruntime.network.errors import NetworkConfigError, NetworkError
from vmruntime.network.subnets import ranges, routes

FILE_NAME = "10-vmruntime.conflist"
SIZE_LIMIT = 256 * 1024

VARIABLES = ("pod_cidr", "pod_cidrs", "ranges", "routes")
"""The first CIDR; a list of all; host-local's `ranges` and `routes` for them."""


def render(template: Path, cidrs: Sequence[str]) -> tuple[str, NetworkConf]:
    """Fill in a template; return the text and what it means.

    Args:
        template: JSON with ${VARIABLES}.
        cidrs: At least one, in canonical form.

    Raises:
        NetworkConfigError: The template cannot be read or filled in, or what comes out is no configuration.
    """
    subnets = [ipaddress.ip_network(cidr) for cidr in cidrs]
    values = {
        "pod_cidr": cidrs[0],
        "pod_cidrs": json.dumps(list(cidrs)),
        "ranges": json.dumps(ranges(subnets)),
        "routes": json.dumps(routes(subnets)),
    }
    source = _read(template)
    try:
        text = string.Template(source).substitute(values)
    except (KeyError, ValueError) as error:
        what = f"${{{error.args[0]}}} is not known" if isinstance(error, KeyError) else str(error)
        known = ", ".join(f"${{{name}}}" for name in VARIABLES)
        raise NetworkConfigError(f"{template}: {what}", remedy=f"use {known}; $$ is a dollar sign") from None
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        remedy = "write ${ranges} and the like, not {{...}}" if "{{" in source else ""
        raise NetworkConfigError(f"{template}: not JSON once filled in: {error}", remedy=remedy) from error
    return text, parse(raw, str(template))


def write(text: str, directory: Path) -> bool:
    """Put a configuration in its place, whole or not at all; return whether anything changed.

    Raises:
        NetworkError: The disk does not take it.
    """
    path = directory / FILE_NAME
    # Not one of the suffixes that are read: nobody may see half of it.
    temporary = directory / f".{FILE_NAME}.new"
    try:
        if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
            return False
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise NetworkError(
            f"{path} cannot be written: {error.strerror}",
            remedy="make room, or correct network.conf_dir",
            code=ResourceExhausted.code,
        ) from error
    return True


def _read(template: Path) -> str:
    try:
        with template.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise NetworkConfigError(
            f"network.conf_template: {template}: {error.strerror}", remedy="correct the path, or leave it out"
        ) from error
    if len(data) > SIZE_LIMIT:
        raise NetworkConfigError(f"{template}: larger than {SIZE_LIMIT} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NetworkConfigError(f"{template}: not UTF-8 text at byte {error.start}") from None
