"""What is read back from a namespace, beside what ip(8) shows of it."""

from __future__ import annotations

import ipaddress
import os
import secrets
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmruntime.network import netns, readback
from vmruntime.network.errors import NetworkError
from vmruntime.network.readback import Kernel, Link
from vmruntime.network.rtnetlink import GET_LINK, Rtnetlink

pytestmark = pytest.mark.root

SET_UP = """
link add eth0 type veth peer name outside
link set eth0 address 02:00:00:00:00:05 mtu 1410 up
link set outside up
link add net1 type veth peer name far
link add br0 type bridge
link set net1 master br0 up
link add mv0 link eth0 type macvlan
addr add 10.1.0.5/24 dev eth0
addr add 10.1.0.6/24 dev eth0
addr add 10.3.0.1 peer 10.3.0.2/32 dev eth0
addr add 169.254.0.7/16 dev eth0 scope link
addr add fd00::5/64 dev eth0 nodad
addr add fd00::6/64 dev eth0 nodad valid_lft 1000 preferred_lft 1000
route add default via 10.1.0.1 mtu 1400 advmss 1300 src 10.1.0.6
route add default via 10.1.0.2 metric 200
route add 10.7.0.0/16 dev eth0 scope link
route add 10.8.0.0/16 nexthop via 10.1.0.7 dev eth0 weight 1 nexthop via 10.1.0.8 dev eth0 weight 1
route add 10.9.0.0/16 via inet6 fd00::1 dev eth0
route add blackhole 10.6.0.0/16
route add 10.5.0.0/16 via 10.1.0.1 table 100
route add default via fd00::1 dev eth0
route add fd01::/48 via fd00::2 dev eth0 metric 7 mtu 1300
route add fd02::/48 via fd00::3 dev eth0 protocol ra
neigh add 10.1.0.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent
neigh add fd00::1 lladdr ee:ee:ee:ee:ee:ef dev eth0 nud permanent
neigh add 10.1.0.9 lladdr ee:ee:ee:ee:ee:e0 dev eth0 nud reachable
neigh add proxy 10.1.0.10 dev eth0
"""

PROTOCOLS = {"kernel": readback.BY_KERNEL, "ra": readback.BY_ROUTER, "boot": 3}


@pytest.fixture
async def namespace() -> AsyncIterator[Path]:
    path = Path(f"/run/netns/vmrt-test-{secrets.token_hex(4)}")
    await netns.create(path)
    yield path
    await netns.remove(path)
    assert not path.exists()
    assert str(path) not in Path("/proc/self/mountinfo").read_text()


def ip(namespace: Path, *arguments: str) -> Any:
    argv = ["ip", "-d", "-j", "-n", namespace.name, *arguments]
    return msgspec.json.decode(subprocess.run(argv, check=True, capture_output=True).stdout.strip() or b"[]")


def set_up(namespace: Path, commands: str) -> None:
    subprocess.run(["ip", "-n", namespace.name, "-batch", "-"], input=commands.encode(), check=True)


async def look(namespace: Path) -> Kernel:
    def inside() -> Kernel:
        with Rtnetlink() as kernel:
            return readback.read(kernel)

    return await netns.inside(namespace, inside)


def shown_link(link: dict[str, Any], indexes: dict[str, int]) -> dict[str, Any]:
    """Return what ip(8) shows of an interface as a Link has it."""
    addresses = [
        {
            "cidr": f"{one['local']}/{one['prefixlen']}",
            "link_scope": one["scope"] == "link",
            "permanent": not one.get("dynamic", False),
        }
        for one in link["addr_info"]
    ]
    return {
        "index": link["ifindex"],
        "name": link["ifname"],
        "kind": {"ether": readback.ETHERNET, "loopback": readback.LOOPBACK}[link["link_type"]],
        "up": "UP" in link["flags"],
        "mac": link["address"],
        "mtu": link["mtu"],
        "lower": indexes.get(link.get("link", ""), 0),
        "master": indexes.get(link.get("master", ""), 0),
        "addresses": addresses,
    }


def shown_route(route: dict[str, Any], version: int) -> dict[str, Any]:
    """Return what ip(8) shows of a route as a Route has it."""
    default = "0.0.0.0/0" if version == 4 else "::/0"
    hop = route["nexthops"][0] if "nexthops" in route else route
    return {
        "network": str(ipaddress.ip_network(default if route["dst"] == "default" else route["dst"])),
        "interface": hop["dev"],
        "gateway": hop.get("gateway", ""),
        "protocol": PROTOCOLS[route["protocol"]],
        "metric": route.get("metric", 0),
        "mtu": next((one["mtu"] for one in route.get("metrics", []) if "mtu" in one), 0),
        "source": route.get("prefsrc", ""),
        "other_family": "via" in route,
    }


def plain(one: msgspec.Struct) -> dict[str, Any]:
    return {
        key: str(value) if key == "network" else [plain(each) for each in value] if key == "addresses" else value
        for key, value in msgspec.structs.asdict(one).items()
    }


async def test_all_that_ip_shows(namespace: Path) -> None:
    set_up(namespace, SET_UP)
    seen = await look(namespace)
    links = ip(namespace, "addr", "show")
    indexes = {link["ifname"]: link["ifindex"] for link in links}
    assert [plain(one) for one in seen.links] == [shown_link(one, indexes) for one in links]
    routes = [
        shown_route(one, version)
        for version in (4, 6)
        for one in ip(namespace, f"-{version}", "route", "show")
        if one["type"] == "unicast"
    ]
    key = repr
    assert sorted(map(plain, seen.routes), key=key) == sorted(routes, key=key)
    assert len(routes) > 10
    neighbours = [
        {"interface": one["dev"], "address": one["dst"], "mac": one["lladdr"]}
        for one in ip(namespace, "neigh", "show", "nud", "permanent")
    ]
    assert sorted(map(plain, seen.neighbours), key=key) == sorted(neighbours, key=key)
    assert len(neighbours) == 2


async def test_the_other_end_of_an_interface_is_elsewhere(namespace: Path) -> None:
    """Its index means nothing here, whatever has the same one."""
    outside = f"vmrt{secrets.token_hex(3)}"
    set_up(namespace, f"link add eth0 type veth peer name {outside} netns {os.getpid()}\n")
    seen = await look(namespace)
    assert [(one.name, one.lower) for one in seen.links] == [("lo", 0), ("eth0", 0)]


async def test_more_than_one_answer_holds(namespace: Path) -> None:
    commands = "".join(f"addr add 10.{number // 256}.{number % 256}.1/32 dev lo\n" for number in range(2000))
    set_up(namespace, commands)
    (lo,) = (await look(namespace)).links
    assert isinstance(lo, Link)
    assert len({one.cidr for one in lo.addresses if not one.cidr.startswith("127.")} - {"::1/128"}) == 2000


async def test_what_the_kernel_refuses(namespace: Path) -> None:
    """The message has what was wanted and why not, in the kernel's words where it has any."""

    def refused() -> None:
        with Rtnetlink() as kernel:
            with pytest.raises(NetworkError, match="refuses to set up the interface 99: No such device"):
                kernel.set_link(99, up=True)
            with pytest.raises(NetworkError, match="refuses the neighbour 10.1.0.1: No such device"):
                kernel.set_neighbour(99, "10.1.0.1", "ee:ee:ee:ee:ee:ee")
            with pytest.raises(
                NetworkError, match="refuses a rule for what arrives .*: Invalid argument: Parent Qdisc"
            ):
                kernel.set_rule(1, 1, [])
            assert len(kernel.dump(GET_LINK, bytes(16))) == 1

    await netns.inside(namespace, refused)


async def test_a_namespace_as_ip_netns_makes_them(namespace: Path) -> None:
    (lo,) = ip(namespace, "link")
    assert "UP" in lo["flags"]
    with pytest.raises(NetworkError, match="cannot be made: File exists"):
        await netns.create(namespace)
    await netns.remove(namespace.with_name("vmrt-none"))  # nothing there: success
    # Others' mount namespaces see it too, and see it go.
    shared = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " /run/netns " in line]
    assert any("shared:" in line for line in shared)
