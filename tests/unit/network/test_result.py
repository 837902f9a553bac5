"""Results of every version in one form, and nothing in it that a guest could not use."""

from __future__ import annotations

from typing import Any

import pytest

from vmruntime.model.sandbox import Dns
from vmruntime.network.errors import NetworkError
from vmruntime.network.result import CniAddress, CniResult, CniRoute, parse, valid_ifname

INTERFACES = [
    {"name": "cni0", "mac": "00:11:22:33:44:55"},
    {"name": "veth1", "mac": "55:44:33:22:11:11"},
    {"name": "eth0", "mac": "99:88:77:66:55:44", "sandbox": "/run/netns/x"},
]
V4 = CniAddress(address="10.1.0.5/16", gateway="10.1.0.1", interface="eth0")
V6 = CniAddress(address="fd00::5/64", gateway="fd00::1", interface="eth0")
ROUTES = [CniRoute(destination="0.0.0.0/0"), CniRoute(destination="fd01::/64", gateway="fd00::9")]
DNS = Dns(servers=["10.1.0.1", "fd00::53"], searches=["cluster.local", "svc"], options=["ndots:5"])
DNS_RAW = {
    "nameservers": ["10.1.0.1", "fd00:0::53"],
    "domain": "cluster.local",
    "search": ["svc", "cluster.local"],
    "options": ["ndots:5"],
}
ROUTES_RAW = [{"dst": "0.0.0.0/0"}, {"dst": "fd01::7/64", "gw": "fd00::9"}]


def understood(raw: object) -> CniResult:
    return parse(raw, "eth0", "network n (f)")


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_an_address_of_each_family(version: str) -> None:
    raw = {
        "cniVersion": version,
        "ip4": {"ip": "10.1.0.5/16", "gateway": "10.1.0.1", "routes": ROUTES_RAW[:1]},
        "ip6": {"ip": "fd00::5/64", "gateway": "fd00::1", "routes": ROUTES_RAW[1:]},
        "dns": DNS_RAW,
    }
    assert understood(raw) == CniResult(interfaces=["eth0"], addresses=[V4, V6], routes=ROUTES, dns=DNS)


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_addresses_with_a_version(version: str) -> None:
    raw = {
        "cniVersion": version,
        "interfaces": INTERFACES,
        "ips": [
            {"version": "4", "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2},
            {"version": "6", "address": "fd00::5/64", "gateway": "fd00::1", "interface": 2},
        ],
        "routes": ROUTES_RAW,
        "dns": DNS_RAW,
    }
    assert understood(raw) == CniResult(interfaces=["eth0"], addresses=[V4, V6], routes=ROUTES, dns=DNS)


def test_version_1_0() -> None:
    raw = {
        "cniVersion": "1.0.0",
        "interfaces": INTERFACES,
        "ips": [
            {"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2},
            {"address": "fd00::5/64", "gateway": "fd00::1", "interface": 2},
        ],
        "routes": ROUTES_RAW,
        "dns": DNS_RAW,
    }
    assert understood(raw) == CniResult(interfaces=["eth0"], addresses=[V4, V6], routes=ROUTES, dns=DNS)


def test_version_1_1() -> None:
    """Interfaces and routes say more; routes of other tables are not the pod's main ones."""
    raw = {
        "cniVersion": "1.1.0",
        "interfaces": [*INTERFACES[:2], {**INTERFACES[2], "mtu": 1450, "pciID": "0000:00:1f.6", "socketPath": "/s"}],
        "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2}],
        "routes": [
            {"dst": "0.0.0.0/0", "mtu": 1400, "advmss": 1360, "priority": 10, "table": 254, "scope": 0},
            {"dst": "10.9.0.0/16", "gw": "10.1.0.9", "table": 100},
        ],
    }
    route = CniRoute(destination="0.0.0.0/0", metric=10, mtu=1400)
    assert understood(raw) == CniResult(interfaces=["eth0"], addresses=[V4], routes=[route], dns=Dns())


def test_several_interfaces_and_addresses() -> None:
    interfaces = [{"name": "net1", "sandbox": "/run/netns/x"}, *INTERFACES, {"name": "lo", "sandbox": "/run/netns/x"}]
    ips = [
        {"address": "10.1.0.5/16", "interface": 3},
        {"address": "10.2.0.5/24", "interface": 0},
        {"address": "10.1.0.6/16"},
        {"address": "10.1.0.5/16", "interface": 3},
        {"address": "127.0.0.1/8", "interface": 4},
        {"address": "10.3.0.1/16", "interface": 1},
    ]
    result = understood({"interfaces": interfaces, "ips": ips})
    assert result.interfaces == ["eth0", "net1"]
    assert [(one.address, one.interface) for one in result.addresses] == [
        ("10.1.0.5/16", "eth0"),
        ("10.2.0.5/24", "net1"),
        ("10.1.0.6/16", "eth0"),
    ]


def test_what_some_plugins_write_for_nothing() -> None:
    raw = {
        "interfaces": None,
        "ips": [{"address": "10.1.0.5/16", "gateway": "0.0.0.0"}],
        "routes": None,
        "dns": {"nameservers": [""], "search": None, "options": [""]},
        "ip4": None,
    }
    assert understood(raw) == CniResult(
        interfaces=["eth0"], addresses=[CniAddress(address="10.1.0.5/16", interface="eth0")], routes=[], dns=Dns()
    )


def result_with(**keys: Any) -> dict[str, Any]:
    return {"interfaces": INTERFACES, "ips": [{"address": "10.1.0.5/16", "interface": 2}], **keys}


def addressed(address: object) -> dict[str, Any]:
    return result_with(ips=[{"address": address}])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "expected an object, found NoneType"),
        ([], "expected an object, found list"),
        ({}, "no IP address in the pod"),
        ({"ips": []}, "no IP address in the pod"),
        (result_with(ips=[{"address": "10.1.0.1/16", "interface": 0}]), "no IP address in the pod"),
        (result_with(cniVersion="7.0.0"), "`cniVersion`: '7.0.0' is not supported"),
        (result_with(ips="10.1.0.5/16"), "result: Expected"),
        (result_with(ips=[{"address": "10.1.0.5/16", "interface": 3}]), "`ips[0]`.interface: there is no interface 3"),
        (result_with(ips=[{"address": "10.1.0.5/16", "interface": -1}]), "there is no interface -1"),
        (result_with(ips=[{"address": "10.1.0.5/16", "interface": "eth0"}]), "result: Expected"),
        (addressed("10.1.0.5"), "'10.1.0.5' is not an address with prefix length"),
        (addressed("10.1.0.5/33"), "is not an address with prefix length"),
        (addressed("10.1.0.256/24"), "is not an address with prefix length"),
        (addressed("fe80::1%eth0/64"), "is not an address with prefix length"),
        (addressed(""), "is not an address with prefix length"),
        (addressed(5), "result: Expected `str`"),
        (addressed("0.0.0.0/0"), "cannot be an interface's address"),
        (addressed("10.1.0.5/0"), "cannot be an interface's address"),
        (addressed("127.0.0.1/8"), "cannot be an interface's address"),
        (addressed("224.0.0.1/24"), "cannot be an interface's address"),
        (addressed("::1/128"), "cannot be an interface's address"),
        (addressed("ff02::1/64"), "cannot be an interface's address"),
        (addressed("::ffff:10.1.0.5/112"), "cannot be an interface's address"),
        (result_with(ips=[{"address": "10.1.0.5/16", "gateway": "nobody"}]), "'nobody' is not an IP address"),
        (result_with(ips=[{"address": "10.1.0.5/16", "gateway": "127.0.0.1"}]), "cannot be a gateway"),
        (result_with(routes=[{"dst": "default"}]), "`routes`.dst: 'default' is not an address"),
        (result_with(routes=[{"dst": "0.0.0.0/0", "priority": -1}]), "`$.routes[0].priority`"),
        (result_with(routes=[{"dst": "0.0.0.0/0", "mtu": 65536}]), "`$.routes[0].mtu`"),
        (result_with(routes=[{"gw": "10.1.0.1"}]), "missing required field `dst`"),
        (result_with(routes=[{"dst": "0.0.0.0/0", "gw": "fd00::1"}]), "fd00::1 cannot be the gateway of 0.0.0.0/0"),
        (result_with(routes=[{"dst": "::/0", "gw": "10.1.0.1"}]), "10.1.0.1 cannot be the gateway of ::/0"),
        (result_with(routes=[{"dst": "0.0.0.0/0", "gw": "10.1.0.5"}]), "is the pod's own address 10.1.0.5"),
        (result_with(routes=[{"dst": "0.0.0.0/0", "gw": "239.0.0.1"}]), "cannot be a gateway"),
        (result_with(routes=[{"dst": "0.0.0.0/0"}] * 1025), "`routes` has 1025 entries"),
        (result_with(ips=[{"address": "10.1.0.5/16"}] * 65), "`ips` has 65 entries"),
        (result_with(dns={"nameservers": ["dns.example"]}), "'dns.example' is not an IP address"),
        (result_with(dns={"nameservers": ["10.1.0.1\nnameserver 6.6.6.6"]}), "is not an IP address"),
        (result_with(dns={"search": ["a b"]}), "'a b' cannot be written to resolv.conf"),
        (result_with(dns={"domain": "a\nnameserver 6.6.6.6"}), "cannot be written to resolv.conf"),
        (result_with(dns={"options": ["\u00e9"]}), "cannot be written to resolv.conf"),
        (result_with(dns={"search": ["x" * 256]}), "cannot be written to resolv.conf"),
        (result_with(dns={"search": ["x"] * 65}), "`dns` has 65 entries"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_complaints_name_network_file_and_key(raw: object, message: str) -> None:
    with pytest.raises(NetworkError) as caught:
        understood(raw)
    assert caught.value.message.startswith("network n (f): ")
    assert message in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a:b", "..", ".", "sixteen-letters-", "a\n", "é", "eth%d", "\x7f"])
def test_interface_names_that_the_kernel_refuses(name: str) -> None:
    assert not valid_ifname(name)
    interfaces = [{"name": name, "sandbox": "/run/netns/x"}]
    with pytest.raises(NetworkError, match="is not an interface name"):
        understood({"interfaces": interfaces, "ips": [{"address": "10.1.0.5/16", "interface": 0}]})


def test_interface_names_that_it_takes() -> None:
    assert all(valid_ifname(name) for name in ("eth0", "net1", "fifteen-letters", "eth0.100", "a"))
