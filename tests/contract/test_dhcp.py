"""DHCP behind the taps of image pods: dnsmasq, the kernel's rules and real clients."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pwd
import secrets
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.dhcp_client import (
    ACK,
    DISCOVER,
    LEASE_TIME,
    NAK,
    OFFER,
    REQUEST,
    SERVER_ID,
    DhcpClient,
)
from tests.support.pod_network import MTU, PodNetworks
from tests.support.tap_guest import tap_guest
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.process import run
from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.model.sandbox import Dns, NetworkInterface, PodNetwork, Sandbox
from vmruntime.network import dhcp
from vmruntime.network.dhcp import start_dhcp
from vmruntime.network.errors import NetworkError

pytestmark = pytest.mark.root

USER = "nobody"
DNS = Dns(
    servers=["10.96.0.10", "fd00::a", "10.96.0.11"],
    searches=["default.svc.cluster.local", "svc.cluster.local", "."],
)

SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
set > "$0.lease"
ip link set "$interface" mtu "$mtu"
ip addr add "$ip/$mask" dev "$interface"
set -- $staticroutes
while [ $# -gt 1 ]; do
    if [ "$2" = 0.0.0.0 ]; then ip route add "$1" dev "$interface"; else ip route add "$1" via "$2" dev "$interface"; fi
    shift 2
done
"""


@pytest.fixture(params=["bridge", "ptp"])
def networks(base: Path, request: pytest.FixtureRequest) -> Iterator[PodNetworks]:
    made = PodNetworks(base / secrets.token_hex(4), request.param)
    yield made
    made.end()


class Servers:
    """Servers that a test starts.

    Attributes:
        recorded: What each was recorded as.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.recorded: list[tuple[str, ProcessIdentity]] = []

    async def record(self, role: str, identity: ProcessIdentity) -> None:
        self.recorded.append((role, identity))

    async def start(self, network: PodNetwork | None, dns: Dns = DNS, hostname: str = "web") -> DetachedProcess | None:
        assert network is not None
        return await start_dhcp(network, dns, hostname, self.directory, self.record, USER)

    async def end(self) -> None:
        for _, identity in self.recorded:
            await DetachedProcess(identity).end()


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[Servers]:
    made = Servers(tmp_path)
    yield made
    await made.end()


@contextlib.asynccontextmanager
async def client(networks: PodNetworks, sandbox: Sandbox) -> AsyncIterator[DhcpClient]:
    """Yield a client on the pod's first tap."""
    (tap,) = await networks.service.open_taps(sandbox)
    try:
        yield DhcpClient(tap.fd, nic_of(sandbox).mac)
    finally:
        tap.close()


def nic_of(sandbox: Sandbox) -> NetworkInterface:
    assert sandbox.network is not None
    return sandbox.network.interfaces[0]


def ipv4(sandbox: Sandbox) -> ipaddress.IPv4Interface:
    return next(ipaddress.IPv4Interface(one) for one in nic_of(sandbox).addresses if ":" not in one)


class NodeSide:
    """What the node sees of a pod's frames."""

    def __init__(self, mac: str) -> None:
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self.socket.settimeout(0.3)

    def ports(self) -> set[int]:
        """Return the UDP ports that the pod has sent to since the last time."""
        found = set()
        with contextlib.suppress(TimeoutError):
            while True:
                frame = self.socket.recv(65536)
                if frame[6:12] == self._mac and frame[12:14] == b"\x08\0" and frame[23] == 17:
                    found.add(int.from_bytes(frame[36:38], "big"))
        return found


async def test_a_lease_is_what_cni_gave(networks: PodNetworks, servers: Servers) -> None:
    async with networks.pod() as sandbox, client(networks, sandbox) as guest:
        server = await servers.start(sandbox.network)
        assert server is not None
        assert servers.recorded == [("dhcp", server.identity)]
        lease = await in_thread(guest.lease)
        address = ipv4(sandbox)
        assert lease.address == str(address.ip)
        assert lease.options[1] == address.netmask.packed
        assert lease.options[LEASE_TIME] == b"\xff" * 4
        assert int.from_bytes(lease.options[26], "big") == MTU
        assert lease.addresses(6) == ["10.96.0.10", "10.96.0.11"]
        assert lease.names() == ["default.svc.cluster.local", "svc.cluster.local"]
        assert lease.options[15] == b"default.svc.cluster.local"
        assert lease.options[12] == b"web"
        assert lease.addresses(3) == [networks.gateway]
        expected = {"0.0.0.0/0": networks.gateway}
        if networks.plugin == "ptp":  # which takes the direct route away: all goes by the gateway
            expected |= {f"{networks.gateway}/32": "0.0.0.0", f"{networks.subnet}.0/24": networks.gateway}
        assert lease.routes() == expected
        assert lease.source == lease.addresses(SERVER_ID)[0] == "169.254.67.1"


async def test_cni_stands_in_for_the_pod(networks: PodNetworks, servers: Servers) -> None:
    """And what nobody gave is not told: no server of our own invention, no name."""
    async with networks.pod() as sandbox, client(networks, sandbox) as guest:
        await servers.start(sandbox.network, Dns(), "")
        lease = await in_thread(guest.lease)
        assert lease.addresses(6) == [f"{networks.subnet}.53"]
        assert lease.names() == ["from-the-network"]
        assert 12 not in lease.options
        await servers.end()
        assert sandbox.network is not None
        bare = msgspec.structs.replace(sandbox.network, routes=[], dns=Dns())
        await servers.start(bare, Dns(), "")
        lease = await in_thread(guest.lease)
        assert lease.options.keys().isdisjoint({3, 6, 12, 15, 119, 121})


@pytest.mark.parametrize("networks", ["bridge"], indirect=True)
async def test_host_names_are_no_syntax(networks: PodNetworks, servers: Servers) -> None:
    """What is a keyword, a number or a time to dnsmasq is a name all the same."""
    names = ["a", "7", "123", "ignore", "infinite", "1h", "10.0.0.1", "ab_c", "web-0.svc.cluster.local", "x" * 63]
    async with networks.pod() as sandbox, client(networks, sandbox) as guest:
        for hostname in names:
            await servers.start(sandbox.network, Dns(searches=[hostname, "1.2.3.4", "_a.B_c", "XN--zzzzz"]), hostname)
            lease = await in_thread(guest.lease)
            assert lease.options[12] == lease.options[15] == hostname.encode()
            assert lease.names() == [hostname, "1.2.3.4", "_a.b_c", "xn--zzzzz"]
            await servers.end()


async def test_requests_never_reach_the_node(networks: PodNetworks, servers: Servers) -> None:
    """Whether or not the server runs, once there was one; what else the guest sends does."""
    async with networks.pod() as sandbox, client(networks, sandbox) as guest:
        node = NodeSide(nic_of(sandbox).mac)
        gateway = b"\xff" * 6
        try:
            guest.send(guest.message(DISCOVER))
            assert await in_thread(node.ports) == {67}  # they would
            server = await servers.start(sandbox.network)
            assert server is not None
            address = await in_thread(guest.lease)
            guest.send(guest.datagram(68, 67, address.address, networks.gateway, b"renewal", gateway))
            guest.send(guest.datagram(68, 69, address.address, networks.gateway, b"no DHCP", gateway))
            assert await in_thread(node.ports) == {69}
            await server.end()
            guest.send(guest.message(DISCOVER))
            guest.send(guest.datagram(68, 69, address.address, networks.gateway, b"no DHCP", gateway))
            assert await in_thread(node.ports) == {69}
        finally:
            node.socket.close()


async def test_a_guest_that_has_its_address(networks: PodNetworks, servers: Servers) -> None:
    """It reboots with it, keeps it when it rebinds, and is not let have another's."""
    async with networks.pod() as sandbox, client(networks, sandbox) as guest:
        first = await servers.start(sandbox.network)
        assert first is not None
        address = str(ipv4(sandbox).ip)
        wrong = str(ipaddress.IPv4Address(address) + 1)
        await in_thread(guest.lease)
        await first.end()
        second = await servers.start(sandbox.network)  # which remembers nothing
        assert second is not None
        answers = [
            await in_thread(lambda: guest.ask(REQUEST, requested=address, client=b"\x01system")),
            await in_thread(lambda: guest.ask(REQUEST, requested=address, client=b"\x02another")),
            await in_thread(lambda: guest.ask(REQUEST, source=address)),
            await in_thread(lambda: guest.ask(REQUEST, requested=wrong)),
        ]
        assert [answer and answer.kind for answer in answers] == [ACK, ACK, ACK, NAK]
        assert {answer.address for answer in answers[:3] if answer} == {address}


async def test_two_interfaces_of_one_network(networks: PodNetworks, servers: Servers) -> None:
    """Each tap hears of its own, though the other's address would do for its network."""
    async with networks.pod() as sandbox:
        network = sandbox.network
        assert network is not None
        nic = nic_of(sandbox)
        namespace = Path(network.netns)
        peer = f"vmrt{secrets.token_hex(3)}"
        made = ["ip", "-n", namespace.name, "link", "add", "net1", "type", "veth", "peer", "name", peer]
        (await run(made)).check()
        second = NetworkInterface(
            name="net1", mac="02:00:00:00:00:77", mtu=1300, addresses=[f"{networks.subnet}.77/24"], tap="vmrt-tap77"
        )
        both = msgspec.structs.replace(sandbox, network=msgspec.structs.replace(network, interfaces=[nic, second]))
        one, other = await networks.service.open_taps(both)
        try:
            await servers.start(both.network)
            leases = [
                await in_thread(DhcpClient(tap.fd, interface.mac).lease)
                for tap, interface in ((one, nic), (other, second), (one, nic))
            ]
            assert [lease.address for lease in leases] == [
                str(ipv4(sandbox).ip),
                f"{networks.subnet}.77",
                leases[0].address,
            ]
            assert [lease.source for lease in leases[:2]] == ["169.254.67.1", "169.254.67.2"]
            assert leases[1].options.keys().isdisjoint({3, 6, 119, 121})
            assert (leases[1].options[12], leases[1].options[26]) == (b"web", (1300).to_bytes(2, "big"))
        finally:
            one.close()
            other.close()


async def test_only_this_guest_gets_answers(networks: PodNetworks, servers: Servers) -> None:
    async with networks.pod() as sandbox, client(networks, sandbox) as guest:
        await servers.start(sandbox.network)
        stranger = DhcpClient(guest._tap, "02:00:00:00:00:99")
        assert await in_thread(lambda: stranger.ask(DISCOVER, patience=1.0)) is None
        offer = await in_thread(lambda: guest.ask(DISCOVER))
        assert offer is not None
        assert offer.kind == OFFER


async def test_a_real_client(networks: PodNetworks, servers: Servers, tmp_path: Path) -> None:
    """BusyBox's udhcpc configures the guest with what it hears, and the guest is on the network then."""
    script = tmp_path / "script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    async with networks.pod() as sandbox:
        (tap,) = await networks.service.open_taps(sandbox)
        await servers.start(sandbox.network)
        nic = msgspec.structs.replace(nic_of(sandbox), mtu=1500)
        with tap_guest(nic, tap.fd) as guest:
            tap.close()
            wanted = [word for option in ("staticroutes", "mtu", "search") for word in ("-O", option)]
            command = ["busybox", "udhcpc", "-f", "-q", "-n", "-i", nic.name, *wanted, "-s", str(script)]
            await in_thread(lambda: guest.run(*command))
            lease = dict(
                line.split("=", 1) for line in (tmp_path / "script.lease").read_text().splitlines() if "=" in line
            )
            assert lease["search"].strip("'") == "default.svc.cluster.local svc.cluster.local"
            assert lease["dns"].strip("'") == "10.96.0.10 10.96.0.11"
            assert lease["hostname"].strip("'") == "web"
            assert f"mtu {MTU}" in guest.run("ip", "link", "show", nic.name)
            ping = ["busybox", "ping", "-c", "1", "-w", "10", "-s", "4000", networks.gateway]
            assert "1 packets received" in await in_thread(lambda: guest.run(*ping))


async def test_the_server_has_few_rights(networks: PodNetworks, servers: Servers) -> None:
    async with networks.pod() as sandbox:
        server = await servers.start(sandbox.network)
        assert server is not None
        proc = Path(f"/proc/{server.identity.pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        assert set(status["Uid"].split()) == {str(pwd.getpwnam(USER).pw_uid)}
        assert status["Groups"].split() == []
        held = {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        assert held == {f"{1 << 10 | 1 << 12:016x}"}  # CAP_NET_BIND_SERVICE, CAP_NET_ADMIN
        assert status["NoNewPrivs"] == "1"
        assert os.readlink(proc / "ns" / "net") != os.readlink("/proc/self/ns/net")
        files = {path.name for path in servers.directory.iterdir()}
        assert files == {dhcp.LOG_NAME}
    await server.end()
    assert not server.alive


async def test_what_hinders_the_server(
    networks: PodNetworks, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left running, and the error has the program's words."""
    async with networks.pod() as sandbox:
        with pytest.raises(InvalidArgument, match="hostname: 'a,b' is not a host name"):
            await servers.start(sandbox.network, hostname="a,b")
        assert servers.recorded == []
        assert sandbox.network is not None
        with pytest.raises(FailedPrecondition, match="no account named 'nobody-at-all'"):
            await start_dhcp(sandbox.network, DNS, "web", servers.directory, servers.record, "nobody-at-all")
        with monkeypatch.context() as patch:
            patch.setattr(dhcp, "PROGRAM", "no-dnsmasq-here")
            with pytest.raises(FailedPrecondition, match="'no-dnsmasq-here' is not installed"):
                await servers.start(sandbox.network)
        monkeypatch.setattr(dhcp, "dnsmasq_arguments", lambda *_: ["--no-such-option"])
        with pytest.raises(NetworkError, match="dnsmasq ended at its start: .*command line"):
            await servers.start(sandbox.network)
        monkeypatch.undo()
        subprocess.run(["ip", "-n", Path(sandbox.network.netns).name, "link", "del", nic_of(sandbox).tap], check=True)  # noqa: ASYNC221
        with pytest.raises(NetworkError, match="DHCP cannot be set up"):
            await servers.start(sandbox.network)
    assert not any(DetachedProcess(identity).alive for _, identity in servers.recorded)


async def test_without_an_ipv4_address(networks: PodNetworks, servers: Servers) -> None:
    async with networks.pod() as sandbox:
        assert sandbox.network is not None
        nic = nic_of(sandbox)
        six = msgspec.structs.replace(nic, addresses=[one for one in nic.addresses if ":" in one])
        assert await servers.start(msgspec.structs.replace(sandbox.network, interfaces=[six])) is None
        assert servers.recorded == []
