"""What a guest is given: the kernel's interfaces and routes, joined with CNI's result."""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec
import pytest

from vmruntime.model.sandbox import Dns, Neighbour, NetworkRoute
from vmruntime.network import readback
from vmruntime.network.errors import NetworkError
from vmruntime.network.readback import BY_KERNEL, BY_ROUTER, Address, Kernel, Link, Route
from vmruntime.network.result import CniAddress, CniResult, CniRoute
from vmruntime.network.survey import Nic, Survey, survey

MAC = "b6:a2:4e:00:34:76"
IPIP = 768  # ARPHRD_TUNNEL
NONE = 65534  # ARPHRD_NONE
BY_HAND = 3  # RTPROT_BOOT


def link(name: str, *addresses: str | Address, index: int = 2, **changes: Any) -> Link:
    made = [Address(cidr=one) if isinstance(one, str) else one for one in addresses]
    made_link = Link(index=index, name=name, mac=f"b6:a2:4e:00:34:{index:02x}", mtu=1450, addresses=made)
    return msgspec.structs.replace(made_link, **changes)


LO = link("lo", "127.0.0.1/8", index=1, kind=readback.LOOPBACK, mac="00:00:00:00:00:00")


def route(dst: str, gateway: str = "", dev: str = "eth0", **changes: Any) -> Route:
    default = "::/0" if ":" in gateway else "0.0.0.0/0"
    network = ipaddress.ip_network(default if dst == "default" else dst)
    made = Route(
        network=network,
        interface=dev,
        gateway=gateway,
        protocol=BY_HAND,
        metric=1024 if network.version == 6 else 0,
    )
    return msgspec.structs.replace(made, **changes)


def connected(dst: str, dev: str = "eth0") -> Route:
    return route(dst, dev=dev, protocol=BY_KERNEL)


def join(links: list[Link], routes: list[Route], result: CniResult, *neighbours: readback.Neighbour) -> Survey:
    return survey(Kernel(links=[LO, *links], routes=routes, neighbours=list(neighbours)), result)


def result(*addresses: str, routes: tuple[CniRoute, ...] = (), interface: str = "eth0") -> CniResult:
    found = []
    for cidr in addresses:
        gateway = "fd00::1" if ":" in cidr else "10.1.0.1"
        found.append(CniAddress(address=cidr, gateway=gateway, interface=interface))
    return CniResult(interfaces=[interface], addresses=found, routes=list(routes), dns=Dns())


def routed(*routes: NetworkRoute) -> set[tuple[str, str, str]]:
    return {(one.destination, one.gateway, one.interface) for one in routes}


def test_a_bridge_with_both_families() -> None:
    routes = [
        route("default", "10.1.0.1"),
        connected("10.1.0.0/24"),
        connected("fd00::/64"),
        connected("fe80::/64"),
        route("default", "fd00::1"),
    ]
    nic = link("eth0", "10.1.0.5/24", "fd00::5/64", Address(cidr="fe80::1/64", link_scope=True))
    seen = join([nic], routes, result("10.1.0.5/24", "fd00::5/64"))
    expected = Nic(name="eth0", index=2, mac="b6:a2:4e:00:34:02", mtu=1450, addresses=["10.1.0.5/24", "fd00::5/64"])
    assert seen.nics == [expected]
    assert routed(*seen.routes) == {("0.0.0.0/0", "10.1.0.1", "eth0"), ("::/0", "fd00::1", "eth0")}


def test_routes_that_no_result_mentions() -> None:
    """Calico: the gateway is reached by a route of its own."""
    routes = [route("default", "169.254.1.1"), route("169.254.1.1")]
    seen = join([link("eth0", "10.1.0.5/32")], routes, result("10.1.0.5/32"))
    assert [(one.destination, one.gateway) for one in seen.routes] == [
        ("169.254.1.1/32", ""),
        ("0.0.0.0/0", "169.254.1.1"),
    ]


def test_a_network_that_is_not_reached_directly() -> None:
    """Ptp takes the kernel's route to the pod's own network away, and leads there by the gateway."""
    routes = [route("10.1.0.0/24", "10.1.0.1"), route("10.1.0.1"), route("default", "10.1.0.1")]
    seen = join([link("eth0", "10.1.0.5/24")], routes, result("10.1.0.5/24"))
    assert seen.nics[0].addresses == ["10.1.0.5/32"]
    assert seen.routes[0] == NetworkRoute(destination="10.1.0.1/32", gateway="", interface="eth0")
    assert len(seen.routes) == 3


def test_interfaces_that_no_result_mentions() -> None:
    """Multus: only the first network's result comes back."""
    links = [
        link("net1", "10.2.0.5/24", index=3),
        link("eth0", "10.1.0.5/24", index=4),
        link("net2", index=5),
        link("eth0.7", "10.3.0.5/24", index=6, lower=4),
        link("port", index=7, master=17),
        link("down", index=8, up=False),
        link("tunl0", index=9, kind=IPIP, mac="00:00:00:00"),
        link("vmrt-tap0", index=10),
    ]
    routes = [connected("10.1.0.0/24"), connected("10.2.0.0/24", "net1"), route("10.9.0.0/16", "10.2.0.1", dev="net1")]
    seen = join(links, routes, result("10.1.0.5/24"))
    assert [(nic.name, nic.addresses) for nic in seen.nics] == [
        ("eth0", ["10.1.0.5/24"]),
        ("net1", ["10.2.0.5/24"]),
        ("net2", []),
    ]
    assert routed(*seen.routes) == {("10.9.0.0/16", "10.2.0.1", "net1")}


def test_permanent_neighbours() -> None:
    """What answers no ARP, as the gateway of AWS's plugin."""
    gateway = readback.Neighbour(interface="eth0", address="169.254.1.1", mac="ee:ee:ee:ee:ee:ee")
    others = [msgspec.structs.replace(gateway, **change) for change in ({"interface": "lo"}, {"mac": ""})]
    seen = join([link("eth0", "10.1.0.5/32")], [], result("10.1.0.5/32"), gateway, *others)
    assert seen.nics[0].neighbours == [Neighbour(address="169.254.1.1", mac="ee:ee:ee:ee:ee:ee")]


def test_several_routes_to_one_destination() -> None:
    links = [link("eth0", "10.1.0.5/24"), link("net1", "10.2.0.5/24", index=3)]
    routes = [
        connected("10.1.0.0/24"),
        connected("10.2.0.0/24", "net1"),
        route("default", "10.2.0.1", dev="net1", metric=200),
        route("default", "10.1.0.1", metric=100),
        route("10.8.0.0/16", "10.1.0.7"),
        route("10.7.0.0/16", other_family=True),
        route("default", "fe80::1", protocol=BY_ROUTER),
    ]
    seen = join(links, routes, result("10.1.0.5/24"))
    assert seen.routes == [
        NetworkRoute(destination="10.8.0.0/16", gateway="10.1.0.7", interface="eth0"),
        NetworkRoute(destination="0.0.0.0/0", gateway="10.1.0.1", interface="eth0", metric=100),
        NetworkRoute(destination="0.0.0.0/0", gateway="10.2.0.1", interface="net1", metric=200),
    ]


def test_what_a_route_says_besides() -> None:
    routes = [
        connected("10.1.0.0/24"),
        route("default", "10.1.0.1", mtu=1400, source="10.1.0.6"),
        route("10.2.0.0/16", "10.1.0.1", source="10.99.0.1"),
    ]
    seen = join([link("eth0", "10.1.0.5/24", "10.1.0.6/24")], routes, result("10.1.0.5/24"))
    assert seen.routes == [
        NetworkRoute(destination="0.0.0.0/0", gateway="10.1.0.1", interface="eth0", mtu=1400, source="10.1.0.6"),
        NetworkRoute(destination="10.2.0.0/16", gateway="10.1.0.1", interface="eth0"),
    ]


def test_what_only_the_result_has() -> None:
    """A plugin may leave it to the runtime, or have put its routes into another table."""
    wanted = (
        CniRoute(destination="0.0.0.0/0"),
        CniRoute(destination="::/0"),
        CniRoute(destination="10.9.0.0/16", gateway="10.1.0.9", metric=7, mtu=1400),
        CniRoute(destination="10.1.0.0/24"),
    )
    nic = link("eth0", "10.1.0.5/24", Address(cidr="fd00::99/64", permanent=False))
    seen = join([nic], [connected("10.1.0.0/24")], result("10.1.0.5/24", "fd00::5/64", routes=wanted))
    assert seen.nics[0].addresses == ["10.1.0.5/24", "fd00::5/64"]
    assert routed(*seen.routes) == {
        ("0.0.0.0/0", "10.1.0.1", "eth0"),
        ("::/0", "fd00::1", "eth0"),
        ("10.9.0.0/16", "10.1.0.9", "eth0"),
    }
    assert [(one.metric, one.mtu) for one in seen.routes if one.destination == "10.9.0.0/16"] == [(7, 1400)]


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([link("eth1", "10.1.0.5/24")], "no interface 'eth0' though CNI says so"),
        ([link("eth0", kind=NONE, mac="")], "not an Ethernet interface (its ARPHRD is 65534)"),
        ([link("eth0", mac="00:00:00:00:00:00")], "which no NIC can have"),
        ([link("eth0", mac="01:00:5e:00:00:01")], "which no NIC can have"),
        ([link("eth0", mac="")], "which no NIC can have"),
        ([link("eth0", mtu=67)], "has the MTU 67"),
        ([link("eth0", mtu=65536)], "has the MTU 65536"),
        ([link("eth0", mac=MAC), link("net1", index=3, mac=MAC)], "'eth0' and 'net1' have the same MAC"),
    ],
)  # fmt: skip
def test_what_cannot_be_given_to_a_guest(links: list[Link], message: str) -> None:
    with pytest.raises(NetworkError) as caught:
        join(links, [], result("10.1.0.5/24"))
    assert message in caught.value.message


def test_a_result_that_names_a_tap_of_ours() -> None:
    with pytest.raises(NetworkError, match="no interface 'vmrt-tap0'"):
        join([link("vmrt-tap0")], [], result("10.1.0.5/24", interface="vmrt-tap0"))
