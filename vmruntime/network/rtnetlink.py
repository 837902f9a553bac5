"""The kernel's network configuration, asked and changed directly (rtnetlink(7)).

ip(8) and tc(8) do the same, but each start of one takes longer than all that a pod needs of them. Everything here blocks, for
microseconds, and is about the network namespace that the thread is in.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

from vmruntime.network.errors import NetworkError

# linux/netlink.h
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
REQUEST, ACK, REPLACE, DUMP, CREATE = 0x1, 0x4, 0x100, 0x300, 0x400
DUMP_INTERRUPTED = 0x10
ERROR, DONE = 2, 3
ATTRIBUTE_TYPE = 0x3FFF
NLMSGERR_ATTR_MSG = 1

# linux/rtnetlink.h
NEW_LINK, GET_LINK, NEW_ADDRESS, GET_ADDRESS, GET_ROUTE = 16, 18, 20, 22, 26
NEW_NEIGHBOUR, GET_NEIGHBOUR, NEW_QDISC, NEW_FILTER = 28, 30, 36, 44

# linux/if_link.h, if_addr.h, neighbour.h
IFLA_IFNAME, IFLA_MTU, IFF_UP = 3, 4, 0x1
IFA_ADDRESS, IFA_LOCAL, SCOPE_LINK = 1, 2, 253
NDA_DST, NDA_LLADDR, PERMANENT = 1, 2, 0x80

# linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h
TC_H_INGRESS, INGRESS_HANDLE = 0xFFFFFFF1, 0xFFFF0000
TCA_KIND, TCA_OPTIONS = 1, 2
U32_CLASSID, U32_SEL, U32_ACT, U32_TERMINAL = 1, 5, 7, 1
ACT_KIND, ACT_OPTIONS, MIRRED_PARMS, EGRESS_REDIR, STOLEN = 1, 2, 2, 1, 4
EVERY_PROTOCOL = 0x0300  # ETH_P_ALL as the kernel wants it: in the network's order of bytes, at the end of a word
ROOT_TABLE = 0x800
"""u32's name for the first table of rules of an interface; every rule is in it, so each has a handle we know."""

HEADER = struct.Struct("=IHHII")
ERROR_HEADER = struct.Struct("=i16x")
BUFFER = 65536  # the kernel fills no more than 32 KiB at once

DUMP_TRIES = 10


class Key(NamedTuple):
    """Part of a u32 rule: a frame's four bytes at `offset` from its network header, as far as `mask` goes, are `value`."""

    offset: int
    value: int
    mask: int


class Rtnetlink:
    """A socket to the kernel for the network namespace in which it is opened."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Return all of the kernel's objects of one kind, each as its message without the header.

        Raises:
            NetworkError: The kernel refuses, or they change all the time.
        """
        for _ in range(DUMP_TRIES):
            self._send(kind, DUMP, body)
            found, whole = [], True
            for answer, flags, content in self._answers():
                whole = whole and not flags & DUMP_INTERRUPTED
                if answer not in (DONE, ERROR):
                    found.append(content)
                    continue
                _check(content, "to tell of the pod's network")
                if whole:
                    return found
                break
        raise NetworkError("the pod's network cannot be read: it changes all the time")

    def change(self, kind: int, body: bytes, what: str, flags: int = 0) -> None:
        """Make or change an object.

        Raises:
            NetworkError: The kernel refuses; the message says `what` it refuses, and its reason.
        """
        self._send(kind, ACK | flags, body)
        for answer, _, content in self._answers():
            if answer == ERROR:
                _check(content, what)
                return

    def set_link(self, index: int, *, up: bool = False, name: str = "", mtu: int = 0) -> None:
        """Change an interface: bring it up, rename it, give it an MTU.

        Raises:
            NetworkError: The kernel refuses.
        """
        flags = IFF_UP if up else 0
        body = struct.pack("=BxHiII", 0, 0, index, flags, flags)
        body += attribute(IFLA_IFNAME, name.encode() + b"\0") if name else b""
        body += attribute(IFLA_MTU, struct.pack("=I", mtu)) if mtu else b""
        self.change(NEW_LINK, body, f"to set up the interface {name or index}")

    def set_address(self, index: int, address: str) -> None:
        """Give an interface an IPv4 address of full length that is valid on its link only; there already: success.

        Raises:
            NetworkError: The kernel refuses.
        """
        packed = ipaddress.IPv4Address(address).packed
        body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, SCOPE_LINK, index)
        body += attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
        self.change(NEW_ADDRESS, body, f"the address {address}", CREATE | REPLACE)

    def set_neighbour(self, index: int, address: str, mac: str) -> None:
        """Tell where an IPv4 address is on an interface, for good.

        Raises:
            NetworkError: The kernel refuses.
        """
        body = struct.pack("=BxHiHBB", socket.AF_INET, 0, index, PERMANENT, 0, 0)
        body += attribute(NDA_DST, ipaddress.IPv4Address(address).packed)
        body += attribute(NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
        self.change(NEW_NEIGHBOUR, body, f"the neighbour {address}", CREATE | REPLACE)

    def set_ingress(self, index: int) -> None:
        """Make the place for rules about what arrives at an interface; there already: success.

        Raises:
            NetworkError: The kernel refuses.
        """
        body = struct.pack("=BxxxiIII", 0, index, INGRESS_HANDLE, TC_H_INGRESS, 0) + attribute(TCA_KIND, b"ingress\0")
        self.change(NEW_QDISC, body, "rules for what arrives (CONFIG_NET_SCH_INGRESS)", CREATE | REPLACE)

    def set_rule(self, index: int, number: int, keys: list[Key], target: int = 0) -> None:
        """Make or replace the rule with this number for what arrives at an interface; smaller numbers come first.

        All are u32's, because some kernels have no matchall classifier, and in one table: among tables, handles depend on
        the order in which they were made.

        Args:
            index: The interface, after set_ingress().
            number: Less than 0x1000.
            keys: What a frame must be like; none: every one is meant.
            target: The interface it is sent from instead; 0: it goes to the namespace's own stack.

        Raises:
            NetworkError: The kernel refuses.
        """
        keys = keys or [Key(0, 0, 0)]
        selector = struct.pack("=BBBxHHhhI", U32_TERMINAL, 0, len(keys), 0, 0, 0, 0, 0)
        for key in keys:
            selector += struct.pack("!II", key.mask, key.value) + struct.pack("=ii", key.offset, 0)
        options = attribute(U32_SEL, selector)
        if target:
            parameters = struct.pack("=IIiiiiI", 0, 0, STOLEN, 0, 0, EGRESS_REDIR, target)
            action = attribute(ACT_KIND, b"mirred\0") + attribute(ACT_OPTIONS, attribute(MIRRED_PARMS, parameters))
            options += attribute(U32_ACT, attribute(1, action))
        else:
            # A class without meaning: a rule without an action needs one. (Not every kernel has act_gact.)
            options += attribute(U32_CLASSID, struct.pack("=I", INGRESS_HANDLE | 1))
        handle = ROOT_TABLE << 20 | number
        body = struct.pack("=BxxxiIII", 0, index, handle, INGRESS_HANDLE, 1 << 16 | EVERY_PROTOCOL)
        body += attribute(TCA_KIND, b"u32\0") + attribute(TCA_OPTIONS, options)
        self.change(NEW_FILTER, body, "a rule for what arrives (CONFIG_NET_CLS_U32, CONFIG_NET_ACT_MIRRED)", CREATE)

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, REQUEST | flags, self._sequence, 0) + body)

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """Iterate over the answers to the last request: type, flags and the rest of each; the caller knows the last."""
        while True:
            data = self._socket.recv(BUFFER)
            while len(data) >= HEADER.size:
                length, kind, flags, sequence, _ = HEADER.unpack_from(data)
                if sequence == self._sequence:
                    yield kind, flags, data[HEADER.size : length]
                data = data[(length + 3) & ~3 :]


def attribute(kind: int, content: bytes) -> bytes:
    """Return an attribute of a message."""
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes of a message by their types."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & ATTRIBUTE_TYPE] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def _check(content: bytes, what: str) -> None:
    """Raise NetworkError if an answer says that a request failed."""
    number = -int(struct.unpack_from("=i", content)[0])
    if number:
        words = attributes(content[ERROR_HEADER.size :]).get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode()
        raise NetworkError(f"the kernel refuses {what}: {os.strerror(number)}{f': {words}' if words else ''}")
