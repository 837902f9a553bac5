"""What DHCP tells the guest of an image pod, as arguments of dnsmasq(8).

An image that knows nothing of cloud-init asks for its network by DHCP. It is told what CNI gave the pod, to the letter:
one IPv4 address an interface, for ever, with its prefix, routes, MTU, servers, search domains and host name. IPv6 has no
such way: DHCPv6 knows no routes, and a router advertisement makes its sender the router, which is not CNI's gateway.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import msgspec
import structlog

from vmruntime.errors import InvalidArgument
from vmruntime.model.sandbox import Dns, NetworkInterface, NetworkRoute, PodNetwork

log = structlog.get_logger(__name__)

SERVERS = IPv4Network("169.254.67.0/24")
"""Addresses of the server: one on each tap, where only the guest sees it."""

OPTION_LIMIT = 255  # bytes; how long options are split (RFC 3396), not every client knows
NAME_LIMIT, LABEL_LIMIT = 253, 63  # RFC 1035
NO_GATEWAY = IPv4Address(0)  # on-link (RFC 3442)

ROUTER, NAME_SERVERS, HOST_NAME, DOMAIN_NAME, INTERFACE_MTU = 3, 6, 12, 15, 26  # RFC 2132
DOMAIN_SEARCH, CLASSLESS_ROUTES = 119, 121  # RFC 3397, RFC 3442

OWN_VALUES = (ROUTER, NAME_SERVERS)
"""Options that dnsmasq has a value of its own for, itself, unless they are given without one."""

STATIC_ARGUMENTS = (
    "--keep-in-foreground",
    "--conf-file=/dev/null",  # rather than the host's
    "--pid-file",  # none
    "--log-facility=/dev/null",  # a guest could fill the disk; what keeps it from starting is printed
    "--leasefile-ro",  # no leases to remember: an address has one owner
    "--port=0",  # no DNS
    "--no-hosts",
    "--no-resolv",
    "--no-ping",
    "--bind-interfaces",
    "--except-interface=lo",
    "--dhcp-authoritative",
    "--dhcp-broadcast",  # answers reach a guest that has no address yet without ARP
    "--dhcp-ignore-clid",  # firmware, initramfs and system may call themselves differently
    "--dhcp-ignore-names",
)

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?", re.ASCII)

Route = tuple[IPv4Network, IPv4Address]


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The one address that DHCP has for an interface.

    Attributes:
        number: Of the interface in the pod, from 0.
        server: The server's address on the interface's tap.
    """

    number: int
    nic: NetworkInterface
    address: IPv4Interface
    server: IPv4Address


def leases(network: PodNetwork) -> list[Lease]:
    """Return a lease for each interface that has an IPv4 address and a tap; it is of the first such address."""
    found = []
    for number, nic in enumerate(network.interfaces):
        address = next((one for one in map(ipaddress.ip_interface, nic.addresses) if one.version == 4), None)
        if nic.tap and isinstance(address, IPv4Interface):
            found.append(Lease(number=number, nic=nic, address=address, server=SERVERS[number + 1]))
    return found


def dnsmasq_arguments(network: PodNetwork, dns: Dns, hostname: str) -> list[str]:
    """Return dnsmasq's arguments for a pod; none if it has no IPv4 address.

    They are made of checked names, addresses and numbers only, so there is nothing to escape.

    Args:
        network: As CNI made it.
        dns: As the pod wants it. Each of servers and search domains that it leaves out comes from CNI.
        hostname: Of the guest; empty: it is told none.

    Raises:
        InvalidArgument: A name or server cannot be told by DHCP.
    """
    given = leases(network)
    if not given:
        return []
    common = {HOST_NAME: _host_name(hostname), **_names(network, dns)}
    arguments = list(STATIC_ARGUMENTS)
    for lease in given:
        tag, ip = f"nic{lease.number}", lease.address.ip
        options = _of_interface(network, lease) | (common if lease is given[0] else {HOST_NAME: common[HOST_NAME]})
        arguments += [
            f"--interface={lease.nic.tap}",
            f"--shared-network={lease.nic.tap},{ip}",
            f"--dhcp-range={ip},static,{lease.address.netmask},infinite",
            f"--dhcp-host={lease.nic.mac},set:{tag},{ip},infinite",
        ]
        for number, value in options.items():
            if value:
                arguments.append(f"--dhcp-option=tag:{tag},{number},{value}")
            elif number in OWN_VALUES:
                arguments.append(f"--dhcp-option=tag:{tag},{number}")
    return arguments


def _of_interface(network: PodNetwork, lease: Lease) -> dict[int, str]:
    routes = _routes(network, lease)
    default = [gateway for destination, gateway in routes if destination.prefixlen == 0 and gateway != NO_GATEWAY]
    return {
        INTERFACE_MTU: str(lease.nic.mtu),
        ROUTER: str(default[0]) if default else "",
        NAME_SERVERS: "",
        CLASSLESS_ROUTES: _hex(b"".join(map(_route_bytes, _fitting_routes(routes, lease.nic.name)))),
    }


def _names(network: PodNetwork, dns: Dns) -> dict[int, str]:
    """Return the options that are the pod's and not an interface's: they go with the first lease."""
    servers = [_server(text) for text in dns.servers or network.dns.servers]
    names = [name for name in map(_domain, dns.searches or network.dns.searches) if name]
    return {
        NAME_SERVERS: ",".join(map(str, [one for one in servers if one.version == 4][: OPTION_LIMIT // 4])),
        DOMAIN_SEARCH: ",".join(_fitting_names(names)),
        DOMAIN_NAME: names[0] if names else "",  # all that clients without the search option know
    }


def _routes(network: PodNetwork, lease: Lease) -> list[Route]:
    """Return an interface's routes, the best of each destination, those first by which gateways are reached."""
    mine = [one for one in network.routes if _owner(one, network) == lease.nic.name and ":" not in one.destination]
    routes: dict[IPv4Network, IPv4Address] = {}
    for route in sorted(mine, key=lambda route: route.metric):
        gateway = IPv4Address(route.gateway or 0)
        routes.setdefault(IPv4Network(route.destination), gateway)
    near = [lease.address.network, *(one for one, gateway in routes.items() if gateway == NO_GATEWAY)]
    for gateway in dict.fromkeys(routes.values()):
        if gateway != NO_GATEWAY and not any(gateway in one for one in near):
            routes.setdefault(IPv4Network(gateway), NO_GATEWAY)
    return sorted(routes.items(), key=lambda route: route[1] != NO_GATEWAY)


def _owner(route: NetworkRoute, network: PodNetwork) -> str:
    return route.interface or network.interfaces[0].name


def _fitting_routes(routes: Sequence[Route], interface: str) -> list[Route]:
    """Return the routes that one option has room for: the default route and the way to its gateway before all others."""
    default = next((gateway for destination, gateway in routes if destination.prefixlen == 0), NO_GATEWAY)

    def weight(route: Route) -> bool:
        destination, gateway = route
        return destination.prefixlen != 0 and not (gateway == NO_GATEWAY and default in destination)

    chosen, room = set(), OPTION_LIMIT
    for route in sorted(routes, key=weight):
        room -= len(_route_bytes(route))
        if room < 0:
            log.warning("not all routes are told by DHCP: there are too many", interface=interface, routes=len(routes))
            break
        chosen.add(route)
    return [route for route in routes if route in chosen]


def _route_bytes(route: Route) -> bytes:
    destination, gateway = route
    length = destination.prefixlen
    return bytes([length]) + destination.network_address.packed[: (length + 7) // 8] + gateway.packed


def _fitting_names(names: Sequence[str]) -> list[str]:
    """Return as many search domains, from the first, as one option has room for."""
    room = OPTION_LIMIT
    for number, name in enumerate(names):
        room -= len(name) + 2  # a length before each label, and the root's
        if room < 0:
            log.warning("not all search domains are told by DHCP: there are too many", searches=len(names))
            return list(names[:number])
    return list(names)


def _hex(value: bytes) -> str:
    return value.hex(":")


def _server(text: str) -> IPv4Address | ipaddress.IPv6Address:
    address: IPv4Address | ipaddress.IPv6Address
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        address = IPv4Address(0)
    if address.is_unspecified:
        raise InvalidArgument.field("dns.servers", text[:80], "is not a server's IP address")
    return address


def _host_name(text: str) -> str:
    if text and not _is_name(text):
        raise InvalidArgument.field("hostname", text[:80], "is not a host name", remedy="letters, digits, - and . only")
    return text


def _domain(text: str) -> str:
    """Return a search domain without the dot that may end it; the root, which Kubernetes allows, becomes nothing."""
    name = text.removesuffix(".").lower()  # as dnsmasq does itself, by rules of Unicode that refuse some names
    if name and not _is_name(name):
        raise InvalidArgument.field("dns.searches", text[:80], "is not a domain name")
    return name


def _is_name(text: str) -> bool:
    labels = text.split(".")
    return len(text) <= NAME_LIMIT and all(len(one) <= LABEL_LIMIT and _LABEL.fullmatch(one) for one in labels)
