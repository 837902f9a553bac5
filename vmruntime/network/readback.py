"""Interfaces, routes and neighbours of a network namespace, as its kernel has them."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator

import msgspec

from vmruntime.network.rtnetlink import GET_ADDRESS, GET_LINK, GET_NEIGHBOUR, GET_ROUTE, Rtnetlink, attributes

# linux/if_arp.h, if.h, if_link.h
ETHERNET, LOOPBACK = 1, 772
UP = 0x1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINK_NETNSID = 1, 3, 4, 5, 10, 37

# linux/if_addr.h
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
PERMANENT_ADDRESS = 0x80

# linux/rtnetlink.h
UNICAST, MAIN_TABLE, CLONED = 1, 254, 0x200
BY_KERNEL, BY_ROUTER = 2, 9  # RTPROT_KERNEL, RTPROT_RA
LINK_SCOPE = 253
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH, RTA_TABLE, RTA_VIA = (
    1, 4, 5, 6, 7, 8, 9, 15, 18
)  # fmt: skip
RTAX_MTU = 2

# linux/neighbour.h
NDA_DST, NDA_LLADDR = 1, 2
PERMANENT_NEIGHBOUR, PROXY = 0x80, 0x08

FAMILIES = (socket.AF_INET, socket.AF_INET6)

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """An address of an interface.

    Attributes:
        cidr: With the length of its prefix.
        link_scope: It means something on its link only.
        permanent: Somebody gave it, rather than a router.
    """

    cidr: str
    link_scope: bool = False
    permanent: bool = True


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """An interface.

    Attributes:
        kind: Of its hardware (ARPHRD_*); ETHERNET is what a guest can have.
        lower: Index of the interface of this namespace that it is stacked on, or connected with; 0: none.
        master: Index of the bridge or the like that it is a port of; 0: none.
    """

    index: int
    name: str
    kind: int = ETHERNET
    up: bool = True
    mac: str
    mtu: int
    lower: int = 0
    master: int = 0
    addresses: list[Address] = []


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A route of the main table that leads somewhere; of several next hops, the first.

    Attributes:
        gateway: Empty: on-link.
        protocol: Who made it (RTPROT_*).
        metric: 0: the kernel's default.
        mtu: Bytes; 0: the interface's.
        source: Preferred address of our own; empty: the kernel's choice.
        other_family: Its gateway is of the other IP version, and not told here.
    """

    network: IpNetwork
    interface: str
    gateway: str = ""
    protocol: int = 0
    metric: int = 0
    mtu: int = 0
    source: str = ""
    other_family: bool = False


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """A permanent neighbour."""

    interface: str
    address: str
    mac: str


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """All of a namespace that concerns its guest."""

    links: list[Link]
    routes: list[Route]
    neighbours: list[Neighbour] = []


def read(kernel: Rtnetlink) -> Kernel:
    """Look at a namespace.

    Raises:
        NetworkError: The kernel does not tell.
    """
    addresses: dict[int, list[Address]] = {}
    for message in kernel.dump(GET_ADDRESS, bytes(8)):
        family, index = message[0], _number(message[4:8])
        if family in FAMILIES:
            addresses.setdefault(index, []).append(_address(message))
    links = [_link(message, addresses) for message in kernel.dump(GET_LINK, bytes(16))]
    names = {link.index: link.name for link in links}
    return Kernel(
        links=links,
        routes=list(_routes(kernel.dump(GET_ROUTE, bytes(12)), names)),
        neighbours=list(_neighbours(kernel.dump(GET_NEIGHBOUR, bytes(12)), names)),
    )


def _address(message: bytes) -> Address:
    length, flags, scope = message[1:4]
    found = attributes(message[8:])
    if IFA_FLAGS in found:
        flags = _number(found[IFA_FLAGS])
    # The second is the other end's where there is a first.
    own = ipaddress.ip_address(found[IFA_LOCAL] if IFA_LOCAL in found else found[IFA_ADDRESS])
    return Address(cidr=f"{own}/{length}", link_scope=scope == LINK_SCOPE, permanent=bool(flags & PERMANENT_ADDRESS))


def _link(message: bytes, addresses: dict[int, list[Address]]) -> Link:
    kind, index, flags = struct.unpack_from("=2xHiI", message)
    found = attributes(message[16:])
    return Link(
        index=index,
        name=found[IFLA_IFNAME].rstrip(b"\0").decode(errors="replace"),
        kind=kind,
        up=bool(flags & UP),
        mac=_mac(found.get(IFLA_ADDRESS, b"")),
        mtu=_number(found[IFLA_MTU]),
        # With the last of them it is the index of an interface elsewhere.
        lower=_number(found.get(IFLA_LINK)) if IFLA_LINK_NETNSID not in found else 0,
        master=_number(found.get(IFLA_MASTER)),
        addresses=addresses.get(index, []),
    )


def _routes(messages: list[bytes], names: dict[int, str]) -> Iterator[Route]:
    for message in messages:
        family, length, table, protocol, kind, flags = struct.unpack_from("=BB2xBBxBI", message)
        found = attributes(message[12:])
        table = _number(found[RTA_TABLE]) if RTA_TABLE in found else table
        if family not in FAMILIES or table != MAIN_TABLE or kind != UNICAST or flags & CLONED:
            continue
        hop = found
        if len(found.get(RTA_MULTIPATH, b"")) >= 8:
            size, index = struct.unpack_from("=H2xi", found[RTA_MULTIPATH])
            hop = {RTA_OIF: struct.pack("=i", index), **attributes(found[RTA_MULTIPATH][8:size])}
        any_address = bytes(4 if family == socket.AF_INET else 16)
        yield Route(
            network=ipaddress.ip_network((found.get(RTA_DST, any_address), length)),
            interface=names.get(_number(hop.get(RTA_OIF)), ""),
            gateway=_ip(hop.get(RTA_GATEWAY)),
            protocol=protocol,
            metric=_number(found.get(RTA_PRIORITY)),
            mtu=_number(attributes(found.get(RTA_METRICS, b"")).get(RTAX_MTU)),
            source=_ip(found.get(RTA_PREFSRC)),
            other_family=RTA_VIA in hop,
        )


def _neighbours(messages: list[bytes], names: dict[int, str]) -> Iterator[Neighbour]:
    for message in messages:
        family, index, state, flags = struct.unpack_from("=B3xiHB", message)
        found = attributes(message[12:])
        wanted = family in FAMILIES and state & PERMANENT_NEIGHBOUR and not flags & PROXY
        if wanted and NDA_DST in found and index in names:
            yield Neighbour(interface=names[index], address=_ip(found[NDA_DST]), mac=_mac(found.get(NDA_LLADDR, b"")))


def _number(content: bytes | None) -> int:
    return int(struct.unpack("=I", content)[0]) if content else 0


def _ip(content: bytes | None) -> str:
    return str(ipaddress.ip_address(content)) if content else ""


def _mac(content: bytes) -> str:
    return content.hex(":")
