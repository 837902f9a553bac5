"""Checks of programs, which are all alike."""

from __future__ import annotations

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, Check, found, missing
from vmruntime.config.settings import Settings


def first_line(text: str | None) -> str:
    """Return the first line of a program's answer."""
    return next(iter((text or "").strip().splitlines()), "")


def program(name: str, why: str, package: str, *, essential: bool = True) -> Check:
    """Return a check that a program is installed.

    Args:
        name: Of the program.
        why: What vmruntime uses it for.
        package: Debian's and Ubuntu's name of the package it is in.
        essential: Whether pods need it.
    """

    def check(host: Host, settings: Settings) -> Capability:
        path = host.which(name)
        if path is None:
            return missing(name, f"not installed; it {why}", f"apt install {package}", essential=essential)
        return found(name, path)

    return check
