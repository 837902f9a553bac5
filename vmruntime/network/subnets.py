"""Subnets of pods, in the form that the host-local plugin wants."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network


def ranges(subnets: Sequence[Subnet]) -> list[list[dict[str, str]]]:
    """Return host-local's `ranges`: a set for each IP version, so that a pod gets one address of each."""
    sets = ([one for one in subnets if one.version == version] for version in (4, 6))
    return [[{"subnet": str(one)} for one in of_version] for of_version in sets if of_version]


def routes(subnets: Sequence[Subnet]) -> list[dict[str, str]]:
    """Return a default route for each IP version."""
    versions = {one.version for one in subnets}
    return [{"dst": dst} for version, dst in ((4, "0.0.0.0/0"), (6, "::/0")) if version in versions]
