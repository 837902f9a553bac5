"""What DHCP tells guests, as arguments. What dnsmasq makes of them is tested with it: tests/contract/test_dhcp.py."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmruntime.errors import InvalidArgument
from vmruntime.model.sandbox import Dns, NetworkInterface, NetworkRoute, PodNetwork
from vmruntime.network.dhcp_options import STATIC_ARGUMENTS, dnsmasq_arguments, leases

ETH0 = NetworkInterface(
    name="eth0", mac="0a:58:0a:58:00:05", mtu=1450, addresses=["fd00::5/64", "10.88.0.5/16", "10.88.0.6/16"], tap="tap3"
)
NET1 = NetworkInterface(name="net1", mac="0a:58:0a:58:00:06", mtu=9000, addresses=["192.168.7.2/24"], tap="tap5")
DUAL = PodNetwork(
    netns="/run/netns/x",
    interfaces=[ETH0, NET1],
    routes=[
        NetworkRoute(destination="172.16.0.0/12", gateway="192.168.7.1", interface="net1"),
        NetworkRoute(destination="0.0.0.0/0", gateway="10.88.0.1"),
        NetworkRoute(destination="::/0", gateway="fd00::1", interface="eth0"),
    ],
    dns=Dns(servers=["10.88.0.1"], searches=["cni.example"]),
)
CLUSTER = Dns(servers=["10.96.0.10", "fd00::a"], searches=["default.svc.cluster.local", ".", "svc.cluster.local."])


def told(network: PodNetwork, dns: Dns = CLUSTER, hostname: str = "web") -> list[str]:
    """Return the arguments that are the pod's own."""
    arguments = dnsmasq_arguments(network, dns, hostname)
    assert tuple(arguments[: len(STATIC_ARGUMENTS)]) == STATIC_ARGUMENTS
    return arguments[len(STATIC_ARGUMENTS) :]


def routed(*routes: NetworkRoute, address: str = "10.1.2.3/24") -> str | None:
    """Return option 121 of a pod with these routes."""
    nic = msgspec.structs.replace(ETH0, addresses=[address])
    prefix = "--dhcp-option=tag:nic0,121,"
    network = PodNetwork(netns="/run/netns/x", interfaces=[nic], routes=list(routes))
    return next((one.removeprefix(prefix) for one in told(network) if one.startswith(prefix)), None)


def test_two_interfaces() -> None:
    """Each has its own address, MTU and routes; servers and search domains belong to the first."""
    assert told(DUAL) == [
        "--interface=tap3",
        "--shared-network=tap3,10.88.0.5",
        "--dhcp-range=10.88.0.5,static,255.255.0.0,infinite",
        "--dhcp-host=0a:58:0a:58:00:05,set:nic0,10.88.0.5,infinite",
        "--dhcp-option=tag:nic0,26,1450",
        "--dhcp-option=tag:nic0,3,10.88.0.1",
        "--dhcp-option=tag:nic0,6,10.96.0.10",
        "--dhcp-option=tag:nic0,121,00:0a:58:00:01",
        "--dhcp-option=tag:nic0,12,web",
        "--dhcp-option=tag:nic0,119,default.svc.cluster.local,svc.cluster.local",
        "--dhcp-option=tag:nic0,15,default.svc.cluster.local",
        "--interface=tap5",
        "--shared-network=tap5,192.168.7.2",
        "--dhcp-range=192.168.7.2,static,255.255.255.0,infinite",
        "--dhcp-host=0a:58:0a:58:00:06,set:nic1,192.168.7.2,infinite",
        "--dhcp-option=tag:nic1,26,9000",
        "--dhcp-option=tag:nic1,3",  # dnsmasq would name itself
        "--dhcp-option=tag:nic1,6",
        "--dhcp-option=tag:nic1,121,0c:ac:10:c0:a8:07:01",
        "--dhcp-option=tag:nic1,12,web",
    ]


def test_each_part_of_dns_comes_from_cni_if_the_pod_leaves_it_out() -> None:
    arguments = told(DUAL, Dns(searches=["own.example"]), "")
    assert "--dhcp-option=tag:nic0,6,10.88.0.1" in arguments
    assert "--dhcp-option=tag:nic0,119,own.example" in arguments
    assert "--dhcp-option=tag:nic0,119,cni.example" in told(DUAL, Dns(), "")
    assert not any(",12," in argument for argument in arguments)


def test_interfaces_without_a_lease() -> None:
    """No IPv4 address, or no tap: the server's own addresses stay those of the interfaces' numbers."""
    six = msgspec.structs.replace(ETH0, addresses=["fd00::5/64"])
    network = msgspec.structs.replace(DUAL, interfaces=[six, NET1])
    assert [(one.nic.name, str(one.server)) for one in leases(network)] == [("net1", "169.254.67.2")]
    assert "--dhcp-option=tag:nic1,6,10.96.0.10" in told(network)
    assert dnsmasq_arguments(msgspec.structs.replace(DUAL, interfaces=[six]), CLUSTER, "web") == []
    assert leases(msgspec.structs.replace(DUAL, interfaces=[msgspec.structs.replace(NET1, tap="")])) == []


def test_routes_in_an_order_in_which_gateways_can_be_reached() -> None:
    default = NetworkRoute(destination="0.0.0.0/0", gateway="169.254.1.1", interface="eth0")
    link = NetworkRoute(destination="169.254.1.1/32", interface="eth0")
    calico = "20:a9:fe:01:01:00:00:00:00:00:a9:fe:01:01"
    assert routed(default, link, address="10.1.2.3/32") == calico
    assert routed(default, address="10.1.2.3/32") == calico  # the way to the gateway is told though CNI left it out
    assert routed() is None
    assert routed(NetworkRoute(destination="10.9.0.0/15", interface="other", gateway="10.1.2.1")) is None


def test_the_best_of_two_routes_to_one_destination() -> None:
    worse, better = (
        NetworkRoute(destination="203.0.113.0/24", gateway=f"10.1.2.{metric}", metric=metric) for metric in (60, 50)
    )
    assert routed(worse, better) == "18:cb:00:71:0a:01:02:32"


def test_too_many_routes() -> None:
    """The default route and the way to its gateway are told in any case."""
    many = [NetworkRoute(destination=f"10.{number}.0.0/16", gateway="10.1.2.1") for number in range(100)]
    default = NetworkRoute(destination="0.0.0.0/0", gateway="169.254.1.1")
    option = routed(*many, default)
    assert option is not None
    value = bytes.fromhex(option.replace(":", ""))
    assert len(value) <= 255
    assert value.startswith(bytes.fromhex("20a9fe010100000000"))
    assert value.endswith(bytes.fromhex("00a9fe0101"))
    assert (len(value) - 9 - 5) // 7 == 34


def test_too_many_search_domains_and_servers() -> None:
    searches = [f"{letter}.example.org" for letter in "abcdefghijklmnopqrstuvwxyz"]
    servers = [f"10.0.0.{number}" for number in range(1, 80)]
    arguments = told(DUAL, Dns(servers=servers, searches=searches))
    domains = next(one for one in arguments if ",119," in one).split(",")[2:]
    assert domains == searches[:17]  # 15 bytes each
    assert len(next(one for one in arguments if "nic0,6," in one).split(",")[2:]) == 63


@pytest.mark.parametrize(
    "name",
    ["a,b", "a b", "a\nb", "-a", "a-", "a..b", "", "ä", "a" * 64, ".".join(["a" * 63] * 4), "a\0", "a;b", "x=#y"],
)
def test_names_that_are_none(name: str) -> None:
    if name:
        with pytest.raises(InvalidArgument, match="hostname: .* is not a host name"):
            dnsmasq_arguments(DUAL, CLUSTER, name)
        with pytest.raises(InvalidArgument, match=r"dns\.searches: .* is not a domain name"):
            dnsmasq_arguments(DUAL, Dns(searches=["fine.example", name]), "web")
        with pytest.raises(InvalidArgument, match=r"dns\.searches: "):
            dnsmasq_arguments(msgspec.structs.replace(DUAL, dns=Dns(searches=[name])), Dns(), "web")
    with pytest.raises(InvalidArgument, match=r"dns\.servers: .* is not a server's IP address"):
        dnsmasq_arguments(DUAL, Dns(servers=[name]), "web")


def test_a_server_that_dnsmasq_would_take_for_itself() -> None:
    with pytest.raises(InvalidArgument, match=r"dns\.servers: '0\.0\.0\.0' is not"):
        dnsmasq_arguments(DUAL, Dns(servers=["0.0.0.0"]), "web")


@given(st.text(max_size=70), st.lists(st.text(max_size=70), max_size=3), st.lists(st.text(max_size=40), max_size=2))
def test_no_text_is_syntax(hostname: str, searches: list[str], servers: list[str]) -> None:
    """Whatever is asked for is refused or keeps to the letters of names."""
    try:
        arguments = told(DUAL, Dns(servers=servers, searches=searches), hostname)
    except InvalidArgument:
        return
    for argument in arguments:
        assert re.fullmatch(r"--[a-z-]+=[A-Za-z0-9_.:,-]+", argument, re.ASCII)
    assert len(arguments) <= 20
