"""The node's pod CIDRs, as kubelet tells them."""

from __future__ import annotations

import ipaddress

from vmruntime.cri.translate.checks import bad

FIELD = "runtime_config.network_config.pod_cidr"
MOST = 16


def pod_cidrs_from_cri(value: str) -> list[str]:
    """Return the CIDRs of a list with commas, host bits cleared; a dual-stack node has two.

    Raises:
        InvalidArgument: One is no CIDR or none for pods, or two overlap.
    """
    parts = [part.strip() for part in value.split(",")] if value.strip() else []
    if len(parts) > MOST:
        raise bad(FIELD, value, f"has {len(parts)} entries; at most {MOST} are usable")
    networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for part in parts:
        try:
            if "/" not in part or "%" in part:
                raise ValueError("no prefix length, or a zone")
            network = ipaddress.ip_network(part, strict=False)
        except ValueError:
            raise bad(
                FIELD, value, f"has {part!r} in it, which is not a CIDR", remedy="such as 10.244.1.0/24"
            ) from None
        if network.prefixlen == 0 or network.is_multicast or network.is_loopback or network.is_link_local:
            raise bad(FIELD, value, f"has {part!r} in it, which cannot be a network of pods")
        for other in networks:
            if other.version == network.version and other.overlaps(network):
                raise bad(FIELD, value, f"has two networks that overlap: {other} and {network}")
        networks.append(network)
    return [str(network) for network in networks]
