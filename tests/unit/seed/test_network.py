"""Networks as guests are told them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vmruntime.model.sandbox import Dns, NetworkInterface, NetworkRoute, PodNetwork
from vmruntime.seed.network import network_config, network_data, route_commands

ETH0 = NetworkInterface(
    name="eth0", mac="0a:58:0a:58:00:05", mtu=1450, addresses=["10.88.0.5/16", "fd00::5/64"], tap="tap0"
)
NET1 = NetworkInterface(name="net1", mac="0a:58:0a:58:00:06", mtu=9000, addresses=["192.168.7.2/24"], tap="tap1")
DUAL = PodNetwork(
    netns="/run/netns/x",
    interfaces=[ETH0, NET1],
    routes=[
        NetworkRoute(destination="0.0.0.0/0", gateway="10.88.0.1"),
        NetworkRoute(destination="::/0", gateway="fd00::1", interface="eth0"),
        NetworkRoute(destination="172.16.0.0/12", gateway="192.168.7.1", interface="net1"),
    ],
    dns=Dns(servers=["10.88.0.1"]),
)
CALICO = PodNetwork(
    netns="/run/netns/x",
    interfaces=[msgspec.structs.replace(ETH0, addresses=["10.1.2.3/32"])],
    routes=[
        NetworkRoute(destination="169.254.1.1/32", interface="eth0"),
        NetworkRoute(destination="0.0.0.0/0", gateway="169.254.1.1", interface="eth0"),
    ],
)
CLUSTER = Dns(
    servers=["10.96.0.10", "fd00::a"], searches=["default.svc.cluster.local", "svc.cluster.local"], options=["ndots:5"]
)


def test_two_interfaces_of_both_versions() -> None:
    assert network_config(DUAL, CLUSTER) == {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": "0a:58:0a:58:00:05"},
                "set-name": "eth0",
                "mtu": 1450,
                "dhcp4": False,
                "dhcp6": False,
                "accept-ra": False,
                "addresses": ["10.88.0.5/16", "fd00::5/64"],
                "routes": [{"to": "0.0.0.0/0", "via": "10.88.0.1"}, {"to": "::/0", "via": "fd00::1"}],
                "nameservers": {"addresses": CLUSTER.servers, "search": CLUSTER.searches},
            },
            "net1": {
                "match": {"macaddress": "0a:58:0a:58:00:06"},
                "set-name": "net1",
                "mtu": 9000,
                "dhcp4": False,
                "dhcp6": False,
                "accept-ra": False,
                "addresses": ["192.168.7.2/24"],
                "routes": [{"to": "172.16.0.0/12", "via": "192.168.7.1"}],
            },
        },
    }


def test_a_gateway_outside_of_every_network() -> None:
    ethernet = network_config(CALICO, Dns())["ethernets"]["eth0"]
    assert ethernet["routes"] == [{"to": "0.0.0.0/0", "via": "169.254.1.1", "on-link": True}]
    assert "nameservers" not in ethernet


def test_an_interface_without_addresses_may_hear_routers() -> None:
    bare = msgspec.structs.replace(CALICO, interfaces=[msgspec.structs.replace(ETH0, addresses=[])], routes=[])
    assert "accept-ra" not in network_config(bare, Dns())["ethernets"]["eth0"]


def test_commands_for_routes_that_cloud_init_may_lose() -> None:
    assert route_commands(DUAL) == [["ip", "-6", "route", "replace", "::/0", "via", "fd00::1", "dev", "eth0"]]
    backwards = msgspec.structs.replace(CALICO, routes=CALICO.routes[::-1])
    for network in (CALICO, backwards):
        assert route_commands(network) == [
            ["ip", "-4", "route", "replace", "169.254.1.1/32", "dev", "eth0"],
            ["ip", "-4", "route", "replace", "0.0.0.0/0", "via", "169.254.1.1", "dev", "eth0", "onlink"],
        ]
    near = NetworkRoute(destination="::/0", gateway="fe80::1", interface="eth0")
    assert route_commands(msgspec.structs.replace(CALICO, routes=[near])) == [
        ["ip", "-6", "route", "replace", "::/0", "via", "fe80::1", "dev", "eth0"]
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(Dns(), {"addresses": ["10.88.0.1"]}), (Dns(servers=["1.1.1.1"]), {"addresses": ["1.1.1.1"]})],
)
def test_whose_servers_count(given: Dns, expected: dict[str, Any]) -> None:
    assert network_config(DUAL, given)["ethernets"]["eth0"]["nameservers"] == expected


def test_no_interface() -> None:
    nothing = PodNetwork(netns="/run/netns/x")
    assert network_config(nothing, CLUSTER) == {"version": 2, "ethernets": {}}
    assert network_data(nothing, Dns()) == {"links": [], "networks": [], "services": []}


def test_openstack() -> None:
    assert network_data(DUAL, CLUSTER) == {
        "links": [
            {"id": "eth0", "name": "eth0", "type": "phy", "ethernet_mac_address": "0a:58:0a:58:00:05", "mtu": 1450},
            {"id": "net1", "name": "net1", "type": "phy", "ethernet_mac_address": "0a:58:0a:58:00:06", "mtu": 9000},
        ],
        "networks": [
            {
                "id": "network0", "network_id": "network0", "link": "eth0", "type": "ipv4",
                "ip_address": "10.88.0.5", "netmask": "255.255.0.0",
                "routes": [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.88.0.1"}],
            },
            {
                "id": "network1", "network_id": "network1", "link": "eth0", "type": "ipv6",
                "ip_address": "fd00::5", "netmask": "ffff:ffff:ffff:ffff::",
                "routes": [{"network": "::", "netmask": "::", "gateway": "fd00::1"}],
            },
            {
                "id": "network2", "network_id": "network2", "link": "net1", "type": "ipv4",
                "ip_address": "192.168.7.2", "netmask": "255.255.255.0",
                "routes": [{"network": "172.16.0.0", "netmask": "255.240.0.0", "gateway": "192.168.7.1"}],
            },
        ],
        "services": [
            {"type": "dns", "address": "10.96.0.10", "search": CLUSTER.searches},
            {"type": "dns", "address": "fd00::a"},
        ],
    }  # fmt: skip


def test_openstack_with_two_addresses_of_a_version() -> None:
    two = msgspec.structs.replace(
        CALICO, interfaces=[msgspec.structs.replace(ETH0, addresses=["10.1.2.3/32", "10.1.2.4/32"])]
    )
    networks = network_data(two, Dns())["networks"]
    assert [network["routes"] for network in networks] == [
        [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "169.254.1.1"}],
        [],
    ]
