"""A DHCP client that is nothing but frames on a tap, so that a test sees each answer whole."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import select
import struct
import time

DISCOVER, OFFER, REQUEST, ACK, NAK = 1, 2, 3, 5, 6
MESSAGE_TYPE, REQUESTED, SERVER_ID, LEASE_TIME, WANTED, CLIENT_ID = 53, 50, 54, 51, 55, 61
EVERYTHING = bytes((1, 3, 6, 12, 15, 26, 28, 119, 121))

VNET_HEADER = b"\0" * 10
COOKIE = b"\x63\x82\x53\x63"
HEADERS = 14 + 20 + 8
FIXED = struct.Struct("!BBBBIHHIIII16s64s128s4s")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of a server.

    Attributes:
        address: yiaddr.
        options: Their bytes by number.
    """

    source: str
    address: str
    options: dict[int, bytes]

    @property
    def kind(self) -> int:
        return self.options[MESSAGE_TYPE][0]

    def addresses(self, option: int) -> list[str]:
        value = self.options[option]
        return [str(ipaddress.IPv4Address(value[at : at + 4])) for at in range(0, len(value), 4)]

    def routes(self) -> dict[str, str]:
        """Return option 121 as gateways by destination."""
        value, routes = self.options[121], {}
        while value:
            length, size = value[0], (value[0] + 7) // 8
            network = ipaddress.ip_network((value[1 : 1 + size].ljust(4, b"\0"), length))
            routes[str(network)] = str(ipaddress.IPv4Address(value[1 + size : 5 + size]))
            value = value[5 + size :]
        return routes

    def names(self) -> list[str]:
        """Return option 119, compressed or not (RFC 1035)."""
        value, names, at = self.options[119], [], 0
        while at < len(value):
            labels, here, end = [], at, 0
            while value[here]:
                if value[here] >= 0xC0:
                    end = end or here + 2
                    here = int.from_bytes(value[here : here + 2], "big") & 0x3FFF
                else:
                    labels.append(value[here + 1 : here + 1 + value[here]].decode())
                    here += 1 + value[here]
            names.append(".".join(labels))
            at = end or here + 1
        return names


class DhcpClient:
    """Asks on a tap, as the guest behind it with this MAC."""

    def __init__(self, tap: int, mac: str) -> None:
        self.mac = bytes.fromhex(mac.replace(":", ""))
        self._tap = tap
        self._id = int.from_bytes(os.urandom(4), "big")

    def ask(
        self, kind: int, *, patience: float = 10.0, source: str = "0.0.0.0", client: bytes = b"", **options: str
    ) -> Answer | None:
        """Send one message as a broadcast and return the answer, if there is one in time.

        Args:
            kind: Of the message.
            patience: Seconds.
            source: The address it has already (ciaddr).
            client: Client identifier.
            options: `requested` and `server`: addresses for the options of that name.
        """
        self._id = (self._id + 1) % 2**32
        self.send(self.message(kind, source=source, client=client, **options))
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._tap], [], [], left)[0]:
                answer = self._read(os.read(self._tap, 65536)[len(VNET_HEADER) :])
                if answer is not None:
                    return answer
        return None

    def lease(self) -> Answer:
        """Go from nothing to an address."""
        offer = self.ask(DISCOVER)
        assert offer is not None
        assert offer.kind == OFFER
        server = offer.addresses(SERVER_ID)[0]
        answer = self.ask(REQUEST, requested=offer.address, server=server)
        assert answer is not None
        assert answer.kind == ACK
        return answer

    def send(self, frame: bytes) -> None:
        os.write(self._tap, VNET_HEADER + frame)

    def message(self, kind: int, *, source: str = "0.0.0.0", client: bytes = b"", **options: str) -> bytes:
        """Return a frame with a message to all servers."""
        numbers = {"requested": REQUESTED, "server": SERVER_ID}
        fields = [(MESSAGE_TYPE, bytes([kind])), (WANTED, EVERYTHING), *([(CLIENT_ID, client)] if client else [])]
        fields += [(numbers[name], ipaddress.IPv4Address(value).packed) for name, value in options.items()]
        ciaddr = int(ipaddress.IPv4Address(source))
        fixed = FIXED.pack(1, 1, 6, 0, self._id, 0, 0, ciaddr, 0, 0, 0, self.mac, b"", b"", COOKIE)
        data = fixed + b"".join(bytes([number, len(value)]) + value for number, value in fields) + b"\xff"
        return self.datagram(68, 67, source, "255.255.255.255", data.ljust(300, b"\0"), b"\xff" * 6)

    def datagram(self, port: int, to_port: int, source: str, target: str, data: bytes, to_mac: bytes) -> bytes:
        """Return a frame with a UDP datagram."""
        ends = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(target).packed
        ip = struct.pack("!BBHHHBBH8s", 0x45, 0, 28 + len(data), 0, 0, 64, 17, 0, ends)
        ip = ip[:10] + _checksum(ip).to_bytes(2, "big") + ip[12:]
        return to_mac + self.mac + b"\x08\0" + ip + struct.pack("!HHHH", port, to_port, 8 + len(data), 0) + data

    def _read(self, frame: bytes) -> Answer | None:
        """Return the answer that a frame has for us."""
        if len(frame) < HEADERS + FIXED.size or frame[12:14] != b"\x08\0" or frame[23] != 17:
            return None
        fixed = FIXED.unpack_from(frame, HEADERS)
        if frame[36:38] != (68).to_bytes(2, "big") or fixed[0] != 2 or fixed[4] != self._id:
            return None
        options: dict[int, bytes] = {}
        rest = frame[HEADERS + FIXED.size :]
        while rest and rest[0] != 0xFF:
            if rest[0] == 0:
                rest = rest[1:]
                continue
            options[rest[0]] = options.get(rest[0], b"") + rest[2 : 2 + rest[1]]
            rest = rest[2 + rest[1] :]
        return Answer(
            source=str(ipaddress.IPv4Address(frame[26:30])),
            address=str(ipaddress.IPv4Address(fixed[8])),
            options=options,
        )


def _checksum(header: bytes) -> int:
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
