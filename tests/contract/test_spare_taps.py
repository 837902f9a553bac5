"""Taps that are there before their pod's network: a guest behind one is the pod as behind any other."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.contract.test_taps import first, ip, is_reached, links, reaches
from tests.support.pod_network import MTU, PodNetworks
from tests.support.tap_guest import tap_guest
from vmruntime.aio.pipeline import in_thread
from vmruntime.model.sandbox import Sandbox, SandboxKind, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.network.errors import NetworkError
from vmruntime.network.tap import SpareTap, tap_name

pytestmark = pytest.mark.root

TUNGETIFF = 0x800454D2  # linux/if_tun.h

SECOND_INTERFACE = """
ns=${CNI_NETNS##*/}
if [ "$CNI_COMMAND" = ADD ]; then
    ip -n "$ns" link add net1 type veth peer name "%s" netns $$ && ip -n "$ns" link set net1 up || exit 1
    echo "$request" | python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))'
fi
"""


@pytest.fixture(params=["bridge", "ptp"])
def networks(base: Path, request: pytest.FixtureRequest) -> Iterator[PodNetworks]:
    made = PodNetworks(base / secrets.token_hex(4), request.param)
    yield made
    made.end()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No descriptor stays; a namespace without a name has nothing else."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def container() -> Sandbox:
    spec = SandboxSpec(
        metadata=SandboxMetadata(name="web", uid="uid-web", namespace="default"), kind=SandboxKind.CONTAINER
    )
    return Sandbox(id=secrets.token_hex(32), spec=spec, state=SandboxState.CREATING, created_at=0)


def name(spare: SpareTap) -> str:
    """Return what a tap is called, by its descriptor."""
    return bytes(fcntl.ioctl(spare.fd, TUNGETIFF, bytes(40)))[:16].rstrip(b"\0").decode()


async def test_a_guest_behind_a_spare_tap(networks: PodNetworks) -> None:
    """It has the tap before there is a pod, reaches the node and is reached, and with it the tap goes."""
    spare = await networks.service.spare_tap()
    address = bytes.fromhex(spare.mac.replace(":", ""))
    assert (len(address), address[0] & 3) == (6, 2)  # one station's, locally administered
    assert not Path("/sys/class/net", tap_name(0)).exists()
    async with networks.pod(SandboxKind.CONTAINER, spare) as sandbox:
        nic = first(sandbox)
        assert (nic.mtu, nic.device_mac) == (MTU, spare.mac)
        assert nic.mac != spare.mac
        assert name(spare) == nic.tap
        assert links(sandbox) == {"lo", nic.name, nic.tap}
        with tap_guest(nic, spare.fd) as guest:
            spare.close()
            guest.configure(nic, networks.gateway)
            await in_thread(lambda: reaches(guest, networks.gateway))
            await in_thread(lambda: is_reached(guest, nic.addresses[0].partition("/")[0]))
        assert links(sandbox) == {"lo", nic.name}


def shape(sandbox: Sandbox) -> dict[str, object]:
    """Return all that a pod's first tap is, but for what differs from tap to tap."""
    nic = first(sandbox)
    (link,) = msgspec.json.decode(ip(sandbox, "-d", "link", "show", nic.tap))
    different = {"ifindex", "address", "txqlen"}
    found = {key: value for key, value in link.items() if key not in different}
    for interface in (nic.tap, nic.name):
        argv = ["tc", "-n", Path(sandbox.network.netns).name if sandbox.network else "", "filter", "show"]
        argv += ["dev", interface, "parent", "ffff:"]
        found[interface] = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return msgspec.json.decode(msgspec.json.encode(found).replace(nic.tap.encode(), b"TAP"), type=dict[str, object])


async def test_it_is_as_any_other_tap(networks: PodNetworks) -> None:
    spare = await networks.service.spare_tap()
    async with networks.pod(SandboxKind.CONTAINER, spare) as sandbox:
        ours = shape(sandbox)
        spare.close()
    other = container()
    network, taps = await networks.service.add(other)
    theirs = shape(msgspec.structs.replace(other, network=network))
    for tap in taps:
        tap.close()
    await networks.service.teardown(other.id)
    assert ours == theirs
    assert "Egress Redirect to device TAP" in str(ours["eth0"])
    assert "Egress Redirect to device eth0" in str(ours["TAP"])


async def test_the_first_interface_gets_it(networks: PodNetworks, base: Path) -> None:
    """The others get taps of their own."""
    networks.add_plugin(base / "bin", SECOND_INTERFACE % f"vmrt{secrets.token_hex(3)}")
    spare = await networks.service.spare_tap()
    sandbox = container()
    network, taps = await networks.service.add(sandbox, spare)
    try:
        assert [(nic.name, nic.device_mac) for nic in network.interfaces] == [("eth0", spare.mac), ("net1", "")]
        assert [tap.name for tap in taps] == ["net1"]
        assert name(spare) == network.interfaces[0].tap != network.interfaces[1].tap
    finally:
        spare.close()
        for tap in taps:
            tap.close()
        await networks.service.teardown(sandbox.id)


@pytest.mark.parametrize("kind", [SandboxKind.IMAGE, SandboxKind.HOST])
async def test_other_pods_leave_it_alone(networks: PodNetworks, kind: SandboxKind) -> None:
    spare = await networks.service.spare_tap()
    async with networks.pod(kind, spare) as sandbox:
        assert first(sandbox).device_mac == ""
        assert name(spare) == tap_name(0)
        assert tap_name(0) not in links(sandbox)
    async with networks.pod(SandboxKind.CONTAINER, spare) as sandbox:
        assert name(spare) == first(sandbox).tap
        spare.close()


async def test_a_network_that_fails_leaves_nothing(networks: PodNetworks, base: Path) -> None:
    networks.add_plugin(base / "bin", '[ "$CNI_COMMAND" = DEL ]')
    spare = await networks.service.spare_tap()
    sandbox = container()
    with pytest.raises(NetworkError, match="ADD failed"):
        await networks.service.add(sandbox, spare)
    assert not networks.service.netns_path(sandbox.id).exists()
    spare.close()
    spare.close()


async def test_a_plugin_that_takes_it_away(networks: PodNetworks, base: Path) -> None:
    takes = SECOND_INTERFACE.replace("link set net1 up", f"link delete {tap_name(0)}")
    networks.add_plugin(base / "bin", takes % f"vmrt{secrets.token_hex(3)}")
    spare = await networks.service.spare_tap()
    sandbox = container()
    with pytest.raises(NetworkError, match="the kernel refuses to set up the interface vmrt-tap.*: No such device"):
        await networks.service.add(sandbox, spare)
    assert not networks.service.netns_path(sandbox.id).exists()
    spare.close()


async def test_a_caller_that_goes_away(networks: PodNetworks) -> None:
    """What the thread has made by then is closed (the autouse fixture looks)."""
    making = asyncio.ensure_future(networks.service.spare_tap())
    await asyncio.sleep(0)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
