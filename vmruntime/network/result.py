"""Results of CNI plugins, of every version, in one form.

A plugin is a program the administrator chose, so its result is half trusted: it is checked as carefully as a
request, because its addresses, names and servers travel into the guest's configuration.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from vmruntime.model.sandbox import Dns
from vmruntime.network.conf import SUPPORTED_VERSIONS
from vmruntime.network.errors import NetworkError

IFNAME_LIMIT = 15  # IFNAMSIZ without the final zero
LOOPBACK = "lo"
MAIN_TABLES = (0, 254)  # RT_TABLE_UNSPEC, RT_TABLE_MAIN of linux/rtnetlink.h

LIMITS = {"interfaces": 64, "ips": 64, "routes": 1024, "dns": 64}
"""More than any network needs, and no burden for a guest. Of interfaces, most are the host's."""

WORD_LIMIT = 255  # a domain name


class CniAddress(msgspec.Struct, frozen=True, kw_only=True):
    """An address of the pod.

    Attributes:
        address: CIDR form.
        gateway: Empty when the result names none.
        interface: Name of the interface in the pod.
    """

    address: str
    gateway: str = ""
    interface: str


class CniRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A route as the result has it.

    Attributes:
        gateway: Empty leaves the choice to the runtime.
        metric: 0: the kernel's default.
        mtu: Bytes; 0: the interface's.
    """

    destination: str
    gateway: str = ""
    metric: int = 0
    mtu: int = 0


class CniResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ADD gave a pod.

    Attributes:
        interfaces: Names inside the pod that have an address, in the result's order.
        routes: Those of the main table.
    """

    interfaces: list[str]
    addresses: list[CniAddress]
    routes: list[CniRoute]
    dns: Dns


class _Interface(msgspec.Struct):
    name: str
    sandbox: str = ""


class _Ip(msgspec.Struct):
    address: str
    gateway: str = ""
    interface: int | None = None


class _Route(msgspec.Struct):
    dst: str
    gw: str = ""
    table: int | None = None
    priority: Annotated[int, Meta(ge=0, lt=2**32)] | None = None
    mtu: Annotated[int, Meta(ge=0, lt=2**16)] | None = None


class _Dns(msgspec.Struct):
    nameservers: list[str] | None = None
    domain: str = ""
    search: list[str] | None = None
    options: list[str] | None = None


class _Family(msgspec.Struct):
    """ip4 or ip6 of a version 0.2 result."""

    ip: str
    gateway: str = ""
    routes: list[_Route] | None = None


class _Result(msgspec.Struct):
    cniVersion: str = ""
    interfaces: list[_Interface] | None = None
    ips: list[_Ip] | None = None
    routes: list[_Route] | None = None
    dns: _Dns | None = None
    ip4: _Family | None = None
    ip6: _Family | None = None


def parse(raw: object, ifname: str, source: str) -> CniResult:
    """Check a decoded result and bring it into one form.

    Args:
        raw: What the last plugin of the chain wrote.
        ifname: CNI_IFNAME, which an address without an interface belongs to.
        source: Network and file, for errors.

    Raises:
        NetworkError: A key has the wrong form, or the pod got no address.
    """
    if not isinstance(raw, dict):
        raise NetworkError(f"{source}: result: expected an object, found {type(raw).__name__}")
    try:
        result = msgspec.convert(raw, _Result)
    except (msgspec.ValidationError, RecursionError) as error:
        raise NetworkError(f"{source}: result: {error}") from error
    if result.cniVersion and result.cniVersion not in SUPPORTED_VERSIONS:
        raise NetworkError(f"{source}: result: `cniVersion`: {result.cniVersion[:40]!r} is not supported")
    ips, routes = list(result.ips or []), list(result.routes or [])
    for family in (result.ip4, result.ip6):
        if family is not None:
            ips.append(_Ip(address=family.ip, gateway=family.gateway))
            routes += family.routes or []
    _check_numbers(result, ips, routes, source)
    addresses = _addresses(ips, result.interfaces, ifname, source)
    if not addresses:
        raise NetworkError(f"{source}: the result has no IP address in the pod", remedy="check the network's ipam")
    own = {ipaddress.ip_interface(one.address).ip for one in addresses}
    return CniResult(
        interfaces=list(dict.fromkeys(address.interface for address in addresses)),
        addresses=addresses,
        routes=[_route(route, own, source) for route in routes if route.table is None or route.table in MAIN_TABLES],
        dns=_dns(result.dns or _Dns(), source),
    )


def valid_ifname(name: str) -> bool:
    """Whether the kernel takes the name (dev_valid_name in net/core/dev.c) and every tool can print it.

    A percent sign would make a pattern of it (dev_alloc_name there).
    """
    return (
        0 < len(name) <= IFNAME_LIMIT
        and name.isascii()
        and name.isprintable()
        and name not in (".", "..")
        and not any(c in "/:% " for c in name)
    )


def _check_numbers(result: _Result, ips: Sequence[_Ip], routes: Sequence[_Route], source: str) -> None:
    dns = result.dns or _Dns()
    numbers = {
        "interfaces": len(result.interfaces or []),
        "ips": len(ips),
        "routes": len(routes),
        "dns": max(len(words or []) for words in (dns.nameservers, dns.search, dns.options)),
    }
    for key, number in numbers.items():
        if number > LIMITS[key]:
            raise NetworkError(f"{source}: result: `{key}` has {number} entries; at most {LIMITS[key]} are usable")


def _addresses(ips: list[_Ip], interfaces: list[_Interface] | None, ifname: str, source: str) -> list[CniAddress]:
    addresses: dict[str, CniAddress] = {}
    for number, ip in enumerate(ips):
        where = f"{source}: result: `ips[{number}]`"
        name = ifname
        if ip.interface is not None:
            if interfaces is None or not 0 <= ip.interface < len(interfaces):
                raise NetworkError(f"{where}.interface: there is no interface {ip.interface}")
            if not interfaces[ip.interface].sandbox:
                continue  # an address of the host's side
            name = interfaces[ip.interface].name
        if name == LOOPBACK:
            continue  # every pod has its own
        if not valid_ifname(name):
            raise NetworkError(f"{where}.interface: {name[:40]!r} is not an interface name")
        address = CniAddress(
            address=_address(ip.address, f"{where}.address"),
            gateway=_gateway(ip.gateway, f"{where}.gateway"),
            interface=name,
        )
        addresses.setdefault(f"{address.address} {name}", address)
    return list(addresses.values())


def _route(route: _Route, own: set[ipaddress.IPv4Address | ipaddress.IPv6Address], source: str) -> CniRoute:
    where = f"{source}: result: `routes`"
    destination = _network(route.dst, f"{where}.dst")
    gateway = _gateway(route.gw, f"{where}.gw")
    if gateway and (":" in gateway) != (":" in destination):
        raise NetworkError(f"{where}: {gateway} cannot be the gateway of {destination}")
    if gateway and ipaddress.ip_address(gateway) in own:
        raise NetworkError(f"{where}: the gateway of {destination} is the pod's own address {gateway}")
    return CniRoute(destination=destination, gateway=gateway, metric=route.priority or 0, mtu=route.mtu or 0)


def _dns(dns: _Dns, source: str) -> Dns:
    """Check what becomes lines of resolv.conf(5): a word with a newline would be a line of its own."""
    searches = [word for word in (dns.domain, *(dns.search or [])) if word]
    options = [word for word in dns.options or [] if word]
    for word in (*searches, *options):
        if not word.isascii() or not word.isprintable() or " " in word or len(word) > WORD_LIMIT:
            raise NetworkError(f"{source}: result: `dns`: {word[:80]!r} cannot be written to resolv.conf")
    servers = [str(_ip(server, f"{source}: result: `dns.nameservers`")) for server in dns.nameservers or [] if server]
    return Dns(servers=servers, searches=list(dict.fromkeys(searches)), options=options)


def _address(text: str, where: str) -> str:
    """Return an interface's address in CIDR form."""
    _check_cidr(text, where)
    try:
        address = ipaddress.ip_interface(text)
    except ValueError:
        raise _no_cidr(text, where) from None
    ip = address.ip
    mapped = isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None
    if ip.is_unspecified or ip.is_multicast or ip.is_loopback or mapped or address.network.prefixlen == 0:
        raise NetworkError(f"{where}: {text[:80]!r} cannot be an interface's address")
    return str(address)


def _network(text: str, where: str) -> str:
    _check_cidr(text, where)
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise _no_cidr(text, where) from None


def _check_cidr(text: str, where: str) -> None:
    # Without a length ipaddress takes one for granted, and a zone means nothing in another kernel.
    if "/" not in text or "%" in text:
        raise _no_cidr(text, where)


def _no_cidr(text: str, where: str) -> NetworkError:
    return NetworkError(f"{where}: {text[:80]!r} is not an address with prefix length")


def _gateway(text: str, where: str) -> str:
    """Return a gateway's address; empty: none, which some plugins write as 0.0.0.0 or ::."""
    if not text:
        return ""
    ip = _ip(text, where)
    if ip.is_multicast or ip.is_loopback:
        raise NetworkError(f"{where}: {text[:80]!r} cannot be a gateway")
    return "" if ip.is_unspecified else str(ip)


def _ip(text: str, where: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        if "%" in text:
            raise ValueError("has a zone")
        return ipaddress.ip_address(text)
    except ValueError:
        raise NetworkError(f"{where}: {text[:80]!r} is not an IP address") from None
