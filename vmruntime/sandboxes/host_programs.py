"""The programs that host pods need on the host."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from vmruntime.config.settings import HostSettings
from vmruntime.errors import FailedPrecondition

DIRECTORIES = (Path("/usr/local/libexec/vmruntime"), Path("/usr/libexec/vmruntime"))


class HostPrograms(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of the agent and of crun."""

    agent: str
    crun: str


def find_host_programs(settings: HostSettings) -> HostPrograms:
    """Return the programs.

    Raises:
        FailedPrecondition: One of them is nowhere to be found.
    """
    return HostPrograms(
        agent=_find("host.agent", settings.agent, "vmruntime-agent"), crun=_find("host.crun", settings.crun, "crun")
    )


def _find(field: str, configured: str, name: str) -> str:
    for candidate in [configured] if configured else [str(directory / name) for directory in DIRECTORIES]:
        if os.access(candidate, os.X_OK):
            return candidate
    found = None if configured else shutil.which(name)
    if found is None:
        raise FailedPrecondition(
            f"{field}: {configured or name!r} is not on this host, so it cannot run host pods",
            remedy="run make setup, or install it and set the key",
        )
    return found
