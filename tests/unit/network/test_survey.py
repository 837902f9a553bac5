"""What a guest is given: the kernel's interfaces and routes, joined with CNI's result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmruntime.model.sandbox import Dns, Neighbour, NetworkRoute
from vmruntime.network.errors import NetworkError
from vmruntime.network.result import CniAddress, CniResult, CniRoute
from vmruntime.network.survey import Nic, join

MAC = "b6:a2:4e:00:34:76"


def address(cidr: str, scope: str = "global", **more: Any) -> dict[str, Any]:
    local, _, length = cidr.partition("/")
    family = "inet6" if ":" in cidr else "inet"
    return {"family": family, "local": local, "prefixlen": int(length), "scope": scope, **more}


def link(name: str, *addresses: str | dict[str, Any], index: int = 2, **changes: Any) -> dict[str, Any]:
    info = [address(one) if isinstance(one, str) else one for one in addresses]
    return {
        "ifindex": index,
        "link_index": 5,
        "ifname": name,
        "flags": ["BROADCAST", "MULTICAST", "UP", "LOWER_UP"],
        "mtu": 1450,
        "link_type": "ether",
        "address": f"b6:a2:4e:00:34:{index:02x}",
        "link_netnsid": 0,
        "addr_info": info,
        **changes,
    }


LO = link("lo", address("127.0.0.1/8", "host"), index=1, link_type="loopback", address="00:00:00:00:00:00")


def route(dst: str, gateway: str = "", dev: str = "eth0", **changes: Any) -> dict[str, Any]:
    hop = {"gateway": gateway} if gateway else {}
    preference = {"pref": "medium", "metric": 1024} if ":" in dst + gateway else {}
    return {
        "type": "unicast",
        "dst": dst,
        "dev": dev,
        "table": "main",
        "protocol": "boot",
        **hop,
        **preference,
        **changes,
    }


def connected(dst: str, dev: str = "eth0") -> dict[str, Any]:
    return route(dst, dev=dev, protocol="kernel")


def shown(
    links: list[dict[str, Any]], routes: list[dict[str, Any]], neighbours: Sequence[dict[str, Any]] = ()
) -> bytes:
    return "".join(f"{json.dumps(one)}\n" for one in ([LO, *links], routes, list(neighbours))).encode()


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
        route("ff00::/8", table="local", type="multicast"),
        route("10.1.0.5", table="local", type="local", protocol="kernel"),
    ]
    nic = link("eth0", "10.1.0.5/24", "fd00::5/64", address("fe80::1/64", "link"))
    seen = join(shown([nic], routes), result("10.1.0.5/24", "fd00::5/64"))
    expected = Nic(name="eth0", index=2, mac="b6:a2:4e:00:34:02", mtu=1450, addresses=["10.1.0.5/24", "fd00::5/64"])
    assert seen.nics == [expected]
    assert routed(*seen.routes) == {("0.0.0.0/0", "10.1.0.1", "eth0"), ("::/0", "fd00::1", "eth0")}


def test_routes_that_no_result_mentions() -> None:
    """Calico: the gateway is reached by a route of its own."""
    routes = [route("default", "169.254.1.1"), route("169.254.1.1", scope="link")]
    seen = join(shown([link("eth0", "10.1.0.5/32")], routes), result("10.1.0.5/32"))
    assert [(one.destination, one.gateway) for one in seen.routes] == [
        ("169.254.1.1/32", ""),
        ("0.0.0.0/0", "169.254.1.1"),
    ]


def test_a_network_that_is_not_reached_directly() -> None:
    """Ptp takes the kernel's route to the pod's own network away, and leads there by the gateway."""
    routes = [route("10.1.0.0/24", "10.1.0.1"), route("10.1.0.1"), route("default", "10.1.0.1")]
    seen = join(shown([link("eth0", "10.1.0.5/24")], routes), result("10.1.0.5/24"))
    assert seen.nics[0].addresses == ["10.1.0.5/32"]
    assert seen.routes[0] == NetworkRoute(destination="10.1.0.1/32", gateway="", interface="eth0")
    assert len(seen.routes) == 3


def test_interfaces_that_no_result_mentions() -> None:
    """Multus: only the first network's result comes back."""
    links = [
        link("net1", "10.2.0.5/24", index=3),
        link("eth0", "10.1.0.5/24", index=4),
        link("net2", index=5),
        link("eth0.7", "10.3.0.5/24", index=6, link="eth0"),
        link("port", index=7, master="br0"),
        link("down", index=8, flags=["BROADCAST"]),
        link("tunl0", index=9, link_type="ipip", address="0.0.0.0"),
    ]
    routes = [connected("10.1.0.0/24"), connected("10.2.0.0/24", "net1"), route("10.9.0.0/16", "10.2.0.1", dev="net1")]
    seen = join(shown(links, routes), result("10.1.0.5/24"))
    assert [(nic.name, nic.addresses) for nic in seen.nics] == [
        ("eth0", ["10.1.0.5/24"]),
        ("net1", ["10.2.0.5/24"]),
        ("net2", []),
    ]
    assert routed(*seen.routes) == {("10.9.0.0/16", "10.2.0.1", "net1")}


def test_permanent_neighbours() -> None:
    """What answers no ARP, as the gateway of AWS's plugin."""
    gateway = {"dst": "169.254.1.1", "dev": "eth0", "lladdr": "ee:ee:ee:ee:ee:ee", "state": ["PERMANENT"]}
    others = [{**gateway, "dev": "lo"}, {**gateway, "lladdr": ""}]
    seen = join(shown([link("eth0", "10.1.0.5/32")], [], [gateway, *others]), result("10.1.0.5/32"))
    assert seen.nics[0].neighbours == [Neighbour(address="169.254.1.1", mac="ee:ee:ee:ee:ee:ee")]


def test_several_routes_to_one_destination() -> None:
    links = [link("eth0", "10.1.0.5/24"), link("net1", "10.2.0.5/24", index=3)]
    routes = [
        connected("10.1.0.0/24"),
        connected("10.2.0.0/24", "net1"),
        route("default", "10.2.0.1", dev="net1", metric=200),
        route("default", "10.1.0.1", metric=100),
        route("10.8.0.0/16", nexthops=[{"gateway": "10.1.0.7", "dev": "eth0", "weight": 1}], dev=""),
        route("10.7.0.0/16", via={"family": "inet6", "host": "fe80::1"}),
        route("10.6.0.0/16", type="blackhole"),
        route("10.5.0.0/16", "10.1.0.1", table="100"),
        route("default", "fe80::1", protocol="ra"),
    ]
    seen = join(shown(links, routes), result("10.1.0.5/24"))
    assert seen.routes == [
        NetworkRoute(destination="10.8.0.0/16", gateway="10.1.0.7", interface="eth0"),
        NetworkRoute(destination="0.0.0.0/0", gateway="10.1.0.1", interface="eth0", metric=100),
        NetworkRoute(destination="0.0.0.0/0", gateway="10.2.0.1", interface="net1", metric=200),
    ]


def test_what_a_route_says_besides() -> None:
    routes = [
        connected("10.1.0.0/24"),
        route("default", "10.1.0.1", metrics=[{"advmss": 1300}, {"mtu": 1400}], prefsrc="10.1.0.6"),
        route("10.2.0.0/16", "10.1.0.1", prefsrc="10.99.0.1"),
    ]
    seen = join(shown([link("eth0", "10.1.0.5/24", "10.1.0.6/24")], routes), result("10.1.0.5/24"))
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
    nic = link("eth0", "10.1.0.5/24", address("fd00::99/64", dynamic=True))
    seen = join(shown([nic], [connected("10.1.0.0/24")]), result("10.1.0.5/24", "fd00::5/64", routes=wanted))
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
        ([link("eth0", link_type="none", address="")], "not an Ethernet interface but none"),
        ([link("eth0", address="00:00:00:00:00:00")], "which no NIC can have"),
        ([link("eth0", address="01:00:5e:00:00:01")], "which no NIC can have"),
        ([link("eth0", address="rubbish")], "which no NIC can have"),
        ([link("eth0", mtu=67)], "has the MTU 67"),
        ([link("eth0", mtu=65536)], "has the MTU 65536"),
        ([link("eth0", address=MAC), link("net1", index=3, address=MAC)], "'eth0' and 'net1' have the same MAC"),
    ],
)  # fmt: skip
def test_what_cannot_be_given_to_a_guest(links: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(NetworkError) as caught:
        join(shown(links, []), result("10.1.0.5/24"))
    assert message in caught.value.message


@pytest.mark.parametrize(
    "output",
    [
        shown([link("eth0", "10.1.0.5/99")], []),
        shown([link("eth0", "10.1.0.5/24")], [route("10.1.0.0/99")]),
        shown([link("eth0", "10.1.0.5/24")], [route("unreachable")]),
        shown([link("eth0")], [], [{"dst": "x", "dev": "eth0", "lladdr": MAC}]),
    ],
)
def test_addresses_that_are_none(output: bytes) -> None:
    with pytest.raises(NetworkError, match="an address in the pod that is none"):
        join(output, result("10.1.0.5/24"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=50) | st.sampled_from([b"[]", b"[]\n[]", b"[{}]\n[]\n[]", b"[]\n[{}]\n[]", b"[]\n[]\n[{}]"]))
def test_what_is_not_understood(output: bytes) -> None:
    with pytest.raises(NetworkError):
        join(output, result("10.1.0.5/24"))
