"""What the kernel has in a pod's namespace after ADD: the truth that a guest is given.

A result names the pod's addresses, but not always all there is: some plugins set routes of their own that no result
mentions (Calico's way to its gateway), some make further interfaces (Multus), and MAC and MTU are the kernel's anyway.
So interfaces, addresses and routes are read back and joined with the result.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence

import msgspec
import structlog

from vmruntime.model.sandbox import Neighbour, NetworkRoute
from vmruntime.network.errors import NetworkError
from vmruntime.network.readback import BY_KERNEL, BY_ROUTER, ETHERNET, Kernel, Link, Route
from vmruntime.network.result import LOOPBACK, CniResult, CniRoute, valid_ifname
from vmruntime.network.tap import TAP_PREFIX

log = structlog.get_logger(__name__)

MTU_LEAST = 68  # of IPv4 (RFC 791); the kernel's own limit for Ethernet
MTU_MOST = 65535  # of a virtio-net device

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """An interface of the pod that its guest is to have.

    Attributes:
        index: In the pod's namespace.
        addresses: CIDR form; those that CNI answered come first. One whose network is not reached directly has full length.
        neighbours: Permanent ones.
    """

    name: str
    index: int
    mac: str
    mtu: int
    addresses: list[str]
    neighbours: list[Neighbour] = []


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """A pod's interfaces, the first of the result first, and its routes."""

    nics: list[Nic]
    routes: list[NetworkRoute]


def survey(kernel: Kernel, result: CniResult) -> Survey:
    """Join what a namespace has with what ADD answered.

    Raises:
        NetworkError: What CNI answered is not there, or cannot be given to a guest.
    """
    nics = [_nic(link, kernel, result) for link in _chosen(kernel.links, result)]
    _check_macs(nics)
    return Survey(nics=nics, routes=list(_routes(kernel.routes, nics, result)))


def _chosen(links: Sequence[Link], result: CniResult) -> Iterator[Link]:
    """Iterate over the interfaces of the result, then over what else carries frames of the pod."""
    known = {link.name: link for link in links if not link.name.startswith(TAP_PREFIX)}
    indexes = {link.index for link in links}
    for name in result.interfaces:
        if name not in known:
            raise NetworkError(f"the pod has no interface {name!r} though CNI says so")
        yield known[name]
    for link in known.values():
        if link.name in result.interfaces or link.name == LOOPBACK:
            continue
        # What is stacked on another interface of the pod shares its frames: it cannot be had as well.
        stacked = link.lower in indexes or link.master != 0
        if link.up and link.kind == ETHERNET and not stacked and valid_ifname(link.name):
            yield link


def _nic(link: Link, kernel: Kernel, result: CniResult) -> Nic:
    name = link.name
    if link.kind != ETHERNET:
        raise NetworkError(
            f"the pod's interface {name!r} is not an Ethernet interface (its ARPHRD is {link.kind})",
            remedy="use a plugin that makes one: bridge, ptp, macvlan",
        )
    if not _MAC.fullmatch(link.mac) or int(link.mac[:2], 16) & 1 or link.mac == "00:00:00:00:00:00":
        raise NetworkError(f"the pod's interface {name!r} has the MAC {link.mac!r}, which no NIC can have")
    if not MTU_LEAST <= link.mtu <= MTU_MOST:
        raise NetworkError(f"the pod's interface {name!r} has the MTU {link.mtu}; {MTU_LEAST} to {MTU_MOST} are usable")
    connected = {route.network for route in kernel.routes if route.protocol == BY_KERNEL and route.interface == name}
    there = [one.cidr for one in link.addresses if not one.link_scope and one.permanent]
    answered = [one.address for one in result.addresses if one.interface == name]
    addresses = []
    for cidr in dict.fromkeys((*answered, *there)):
        address = ipaddress.ip_interface(cidr)
        # The guest's kernel makes a route of the prefix; where this one has none, the plugin took it away.
        bare = cidr in there and address.network not in connected
        addresses.append(f"{address.ip}/{address.max_prefixlen}" if bare else cidr)
    known = [
        Neighbour(address=one.address, mac=one.mac)
        for one in kernel.neighbours
        if one.interface == name and _MAC.fullmatch(one.mac)
    ]
    return Nic(name=name, index=link.index, mac=link.mac, mtu=link.mtu, addresses=addresses, neighbours=known)


def _check_macs(nics: Sequence[Nic]) -> None:
    owners: dict[str, str] = {}
    for nic in nics:
        other = owners.setdefault(nic.mac, nic.name)
        if other != nic.name:
            raise NetworkError(
                f"the pod's interfaces {other!r} and {nic.name!r} have the same MAC {nic.mac}; a guest cannot tell them apart",
                remedy="use macvlan rather than ipvlan",
            )


def _routes(routes: Sequence[Route], nics: Sequence[Nic], result: CniResult) -> Iterator[NetworkRoute]:
    """Iterate over the kernel's routes, then over the result's to other destinations."""
    names = {nic.name for nic in nics}
    own = {cidr.partition("/")[0] for nic in nics for cidr in nic.addresses}
    done = {(route.network, 0) for route in routes if route.protocol == BY_KERNEL and route.interface in names}
    # Routes without gateway first: a later one's gateway may be reached by them.
    for route in sorted(routes, key=lambda route: (route.gateway != "", route.metric)):
        # What the kernel made of addresses or learned from a router, the guest's kernel makes or learns itself.
        if route.protocol in (BY_KERNEL, BY_ROUTER) or route.interface not in names:
            continue
        if route.other_family:
            log.warning(
                "route not given to the guest: its gateway is of the other IP version", destination=str(route.network)
            )
            continue
        if (route.network, route.metric) not in done:
            done.add((route.network, route.metric))
            yield NetworkRoute(
                destination=str(route.network),
                gateway=route.gateway,
                interface=route.interface,
                metric=route.metric,
                mtu=route.mtu,
                source=route.source if route.source in own else "",
            )
    destinations = {network for network, _ in done}
    for wanted in result.routes:
        if ipaddress.ip_network(wanted.destination) not in destinations:
            yield _result_route(wanted, result)


def _result_route(wanted: CniRoute, result: CniResult) -> NetworkRoute:
    """Return a route that only the result has; one without a gateway uses that of the first address of its family."""
    of_family = [one for one in result.addresses if (":" in one.address) == (":" in wanted.destination)]
    if wanted.gateway:
        hop = ipaddress.ip_address(wanted.gateway)
        near = [one for one in of_family if hop in ipaddress.ip_interface(one.address).network]
        interface, gateway = (near or of_family or result.addresses)[0].interface, wanted.gateway
    else:
        interface = (of_family or result.addresses)[0].interface
        gateway = of_family[0].gateway if of_family else ""
    return NetworkRoute(
        destination=wanted.destination, gateway=gateway, interface=interface, metric=wanted.metric, mtu=wanted.mtu
    )
