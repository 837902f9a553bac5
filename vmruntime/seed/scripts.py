"""Shell scripts for guests: what makes mounts and names of block volumes where cloud-init alone does not."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from vmruntime.seed.request import SeedDevice, SeedMount


def mount_script(mounts: Sequence[SeedMount]) -> str:
    """Return a script that makes mounts which are not there yet; empty: there is nothing to mount."""
    lines = []
    for mount in mounts:
        path, source = shlex.quote(mount.path), shlex.quote(mount.source)
        options = ["-o", shlex.quote(mount.options)] if mount.options else []
        command = " ".join(["mount", "-t", shlex.quote(mount.fstype), *options, source, path])
        lines.append(f"if ! mountpoint -q {path}; then mkdir -p {path} && {command}; fi")
    return _script(lines)


def device_script(devices: Sequence[SeedDevice]) -> str:
    """Return a script that gives block volumes their names; empty: there are none."""
    lines = []
    for device in devices:
        path = shlex.quote(device.path)
        lines.append(f'mkdir -p "$(dirname {path})" && ln -sfn {shlex.quote(device.source)} {path}')
    return _script(lines)


def _script(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in ["#!/bin/sh", *lines]) if lines else ""
