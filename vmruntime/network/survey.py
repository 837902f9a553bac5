"""What the kernel has in a pod's namespace after ADD: the truth that a guest is given.

A result names the pod's addresses, but not always all there is: some plugins set routes of their own that no result
mentions (Calico's way to its gateway), some make further interfaces (Multus), and MAC and MTU are the kernel's anyway.
So interfaces, addresses and routes are read back, as ip(8) shows them, and joined with the result.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import structlog

from vmruntime.aio.process import last_lines, run
from vmruntime.model.sandbox import Neighbour, NetworkRoute
from vmruntime.network.errors import NetworkError
from vmruntime.network.result import LOOPBACK, CniResult, CniRoute, valid_ifname

log = structlog.get_logger(__name__)

MTU_LEAST = 68  # of IPv4 (RFC 791); the kernel's own limit for Ethernet
MTU_MOST = 65535  # of a virtio-net device

QUESTIONS = b"addr show\nroute show table all\nneigh show nud permanent\n"

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


class _Address(msgspec.Struct):
    family: str = ""
    local: str = ""
    prefixlen: int = 0
    scope: str = ""
    dynamic: bool = False

    @property
    def cidr(self) -> str:
        return f"{self.local}/{self.prefixlen}"


class _Link(msgspec.Struct):
    ifindex: int
    ifname: str
    mtu: int
    link_type: str
    flags: list[str] = []
    address: str = ""
    link: str | None = None
    master: str | None = None
    addr_info: list[_Address] = []


class _Hop(msgspec.Struct):
    gateway: str = ""
    dev: str = ""


class _Metrics(msgspec.Struct):
    mtu: int = 0


class _Neighbour(msgspec.Struct):
    dst: str
    dev: str = ""
    lladdr: str = ""


class _Route(msgspec.Struct):
    dst: str
    type: str = "unicast"
    gateway: str = ""
    dev: str = ""
    table: str = "main"
    protocol: str = ""
    metric: int = 0
    pref: str = ""
    prefsrc: str = ""
    metrics: list[_Metrics] = []
    via: dict[str, str] | None = None
    nexthops: list[_Hop] | None = None

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        if self.dst != "default":
            return ipaddress.ip_network(self.dst)
        # Only routes of IPv6 have a preference (RFC 4191).
        return ipaddress.ip_network("::/0" if self.pref or ":" in self.gateway else "0.0.0.0/0")


async def survey(namespace: Path, result: CniResult) -> Survey:
    """Look at a namespace in which ADD gave `result`.

    Raises:
        NetworkError: What CNI answered is not there, or cannot be given to a guest.
    """
    done = await run(["ip", "-n", namespace.name, "-d", "-j", "-batch", "-"], input=QUESTIONS)
    if done.returncode != 0:
        raise NetworkError(f"the pod's network cannot be read: {last_lines(done.stderr)}")
    return join(done.stdout, result)


def join(shown: bytes, result: CniResult) -> Survey:
    """Join what ip(8) shows with a result.

    Args:
        shown: The answers to QUESTIONS, each a line of JSON: links with their addresses, routes, neighbours.
        result: What ADD answered.

    Raises:
        NetworkError: See survey().
    """
    try:
        first, second, third = shown.strip().splitlines()
        links = msgspec.json.decode(first, type=list[_Link])
        routes = msgspec.json.decode(second, type=list[_Route])
        neighbours = msgspec.json.decode(third, type=list[_Neighbour])
    except ValueError as error:  # msgspec's errors are such, too
        raise NetworkError(f"ip(8) shows the pod's network in a form that is not understood: {error}") from error
    main = [route for route in routes if route.table == "main" and route.type == "unicast"]
    try:
        nics = [_nic(link, main, neighbours, result) for link in _chosen(links, result)]
        _check_macs(nics)
        return Survey(nics=nics, routes=list(_routes(main, nics, result)))
    except ValueError as error:  # of ipaddress
        raise NetworkError(f"ip(8) shows an address in the pod that is none: {error}") from error


def _chosen(links: Sequence[_Link], result: CniResult) -> Iterator[_Link]:
    """Iterate over the interfaces of the result, then over what else carries frames of the pod."""
    known = {link.ifname: link for link in links}
    for name in result.interfaces:
        if name not in known:
            raise NetworkError(f"the pod has no interface {name!r} though CNI says so")
        yield known[name]
    for link in links:
        if link.ifname in result.interfaces or link.ifname == LOOPBACK:
            continue
        # What is stacked on another interface of the pod shares its frames: it cannot be had as well.
        stacked = link.link in known or link.master is not None
        if "UP" in link.flags and link.link_type == "ether" and not stacked and valid_ifname(link.ifname):
            yield link


def _nic(link: _Link, routes: Sequence[_Route], neighbours: Sequence[_Neighbour], result: CniResult) -> Nic:
    name = link.ifname
    if link.link_type != "ether":
        raise NetworkError(
            f"the pod's interface {name!r} is not an Ethernet interface but {link.link_type}",
            remedy="use a plugin that makes one: bridge, ptp, macvlan",
        )
    if not _MAC.fullmatch(link.address) or int(link.address[:2], 16) & 1 or link.address == "00:00:00:00:00:00":
        raise NetworkError(f"the pod's interface {name!r} has the MAC {link.address!r}, which no NIC can have")
    if not MTU_LEAST <= link.mtu <= MTU_MOST:
        raise NetworkError(f"the pod's interface {name!r} has the MTU {link.mtu}; {MTU_LEAST} to {MTU_MOST} are usable")
    connected = {route.network for route in routes if route.protocol == "kernel" and route.dev == name}
    there = [one.cidr for one in link.addr_info if one.local and one.scope != "link" and not one.dynamic]
    answered = [one.address for one in result.addresses if one.interface == name]
    addresses = []
    for cidr in dict.fromkeys((*answered, *(_canonical(one) for one in there))):
        address = ipaddress.ip_interface(cidr)
        # The guest's kernel makes a route of the prefix; where this one has none, the plugin took it away.
        bare = cidr in there and address.network not in connected
        addresses.append(f"{address.ip}/{address.max_prefixlen}" if bare else cidr)
    known = [
        Neighbour(address=str(ipaddress.ip_address(one.dst)), mac=one.lladdr)
        for one in neighbours
        if one.dev == name and _MAC.fullmatch(one.lladdr)
    ]
    return Nic(name=name, index=link.ifindex, mac=link.address, mtu=link.mtu, addresses=addresses, neighbours=known)


def _check_macs(nics: Sequence[Nic]) -> None:
    owners: dict[str, str] = {}
    for nic in nics:
        other = owners.setdefault(nic.mac, nic.name)
        if other != nic.name:
            raise NetworkError(
                f"the pod's interfaces {other!r} and {nic.name!r} have the same MAC {nic.mac}; a guest cannot tell them apart",
                remedy="use macvlan rather than ipvlan",
            )


def _routes(routes: Sequence[_Route], nics: Sequence[Nic], result: CniResult) -> Iterator[NetworkRoute]:
    """Iterate over the kernel's routes, then over the result's to other destinations."""
    names = {nic.name for nic in nics}
    own = {cidr.partition("/")[0] for nic in nics for cidr in nic.addresses}
    done = {(route.network, 0) for route in routes if route.protocol == "kernel" and route.dev in names}
    # Routes without gateway first: a later one's gateway may be reached by them.
    for route in sorted(routes, key=lambda route: (_hop(route).gateway != "", route.metric)):
        hop = _hop(route)
        # What the kernel made of addresses or learned from a router, the guest's kernel makes or learns itself.
        if route.protocol in ("kernel", "ra") or hop.dev not in names:
            continue
        if route.via is not None:
            log.warning("route not given to the guest: its gateway is of the other IP version", destination=route.dst)
            continue
        if (route.network, route.metric) not in done:
            done.add((route.network, route.metric))
            yield NetworkRoute(
                destination=str(route.network),
                gateway=hop.gateway,
                interface=hop.dev,
                metric=route.metric,
                mtu=next((one.mtu for one in route.metrics if one.mtu), 0),
                source=route.prefsrc if route.prefsrc in own else "",
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


def _hop(route: _Route) -> _Hop:
    return route.nexthops[0] if route.nexthops else _Hop(gateway=route.gateway, dev=route.dev)


def _canonical(cidr: str) -> str:
    return str(ipaddress.ip_interface(cidr))
