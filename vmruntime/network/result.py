"""Results of CNI plugins, of every version, in one form.

A plugin is a program the administrator chose, so its result is half trusted: it is checked as carefully as a
request, because its addresses, names and servers travel into the guest's configuration.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec

from vmruntime.model.sandbox import Dns
from vmruntime.network.errors import NetworkError

IFNAME_LIMIT = 15  # IFNAMSIZ without the final zero


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
    """A route as the result has it; an empty gateway leaves the choice to the runtime."""

    destination: str
    gateway: str = ""


class CniResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ADD gave a pod.

    Attributes:
        interfaces: Names inside the pod that have an address, in the result's order.
        raw: The result as the last plugin wrote it, for CHECK and DEL.
    """

    interfaces: list[str]
    addresses: list[CniAddress]
    routes: list[CniRoute]
    dns: Dns
    raw: dict[str, Any]


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
        source: Plugin, network and file, for errors.

    Raises:
        NetworkError: A key has the wrong form, or the pod got no address.
    """
    if not isinstance(raw, dict):
        raise NetworkError(f"{source}: result: expected an object, found {type(raw).__name__}")
    try:
        result = msgspec.convert(raw, _Result)
    except (msgspec.ValidationError, RecursionError) as error:
        raise NetworkError(f"{source}: result: {error}") from error
    ips, routes = list(result.ips or []), list(result.routes or [])
    for family in (result.ip4, result.ip6):
        if family is not None:
            ips.append(_Ip(address=family.ip, gateway=family.gateway))
            routes += family.routes or []
    addresses = _addresses(ips, result.interfaces, ifname, source)
    if not addresses:
        raise NetworkError(f"{source}: the result has no IP address in the pod", remedy="check the network's ipam")
    return CniResult(
        interfaces=list(dict.fromkeys(address.interface for address in addresses)),
        addresses=addresses,
        routes=[_route(route, source) for route in routes],
        dns=_dns(result.dns or _Dns(), source),
        raw=raw,
    )


def _addresses(ips: list[_Ip], interfaces: list[_Interface] | None, ifname: str, source: str) -> list[CniAddress]:
    for interface in interfaces or []:
        if not _valid_ifname(interface.name):
            raise NetworkError(f"{source}: result: {interface.name[:40]!r} is not an interface name")
    addresses = []
    for number, ip in enumerate(ips):
        where = f"{source}: result: `ips[{number}]`"
        name = ifname
        if ip.interface is not None:
            if interfaces is None or not 0 <= ip.interface < len(interfaces):
                raise NetworkError(f"{where}.interface: there is no interface {ip.interface}")
            if not interfaces[ip.interface].sandbox:
                continue  # an address of the host's side
            name = interfaces[ip.interface].name
        addresses.append(
            CniAddress(
                address=_cidr(ip.address, f"{where}.address", host_bits=True),
                gateway=_ip(ip.gateway, f"{where}.gateway"),
                interface=name,
            )
        )
    return addresses


def _route(route: _Route, source: str) -> CniRoute:
    where = f"{source}: result: `routes`"
    destination = _cidr(route.dst, f"{where}.dst", host_bits=False)
    gateway = _ip(route.gw, f"{where}.gw")
    if gateway and (":" in gateway) != (":" in destination):
        raise NetworkError(f"{where}: {gateway} cannot be the gateway of {destination}")
    return CniRoute(destination=destination, gateway=gateway)


def _dns(dns: _Dns, source: str) -> Dns:
    """Check what becomes lines of resolv.conf(5): a word with a newline would be a line of its own."""
    searches = [*([dns.domain] if dns.domain else []), *(dns.search or [])]
    options = dns.options or []
    for word in (*searches, *options):
        if not word or not word.isprintable() or " " in word:
            raise NetworkError(f"{source}: result: `dns`: {word!r} cannot be written to resolv.conf")
    servers = [_ip(server, f"{source}: result: `dns.nameservers`") for server in dns.nameservers or [] if server]
    return Dns(servers=servers, searches=list(dict.fromkeys(searches)), options=list(options))


def _cidr(text: str, where: str, *, host_bits: bool) -> str:
    try:
        if "/" not in text or "%" in text:
            raise ValueError("not in CIDR form")
        if host_bits:
            return str(ipaddress.ip_interface(text))
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise NetworkError(f"{where}: {text[:80]!r} is not an address with prefix length") from None


def _ip(text: str, where: str) -> str:
    if not text:
        return ""
    try:
        if "%" in text:
            raise ValueError("has a zone")
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise NetworkError(f"{where}: {text[:80]!r} is not an IP address") from None


def _valid_ifname(name: str) -> bool:
    """Whether the kernel takes the name (dev_valid_name in net/core/dev.c), and we would print it."""
    return (
        0 < len(name.encode(errors="replace")) <= IFNAME_LIMIT
        and name not in (".", "..")
        and name.isprintable()
        and not any(c in "/: " for c in name)
    )
