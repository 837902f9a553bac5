"""Taps of image pods in real namespaces: they outlive VMs and daemons, and a guest behind one is the pod."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.pod_network import MTU, PLUGINS, PodNetworks
from tests.support.tap_guest import TapGuest, tap_guest
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import Code
from vmruntime.model.sandbox import NetworkInterface, Sandbox, SandboxKind
from vmruntime.network import netns
from vmruntime.network import tap as taps
from vmruntime.network.errors import NetworkError

pytestmark = pytest.mark.root

TUNGETVNETHDRSZ = 0x800454D7  # linux/if_tun.h


@pytest.fixture(params=["bridge", "ptp"])
def networks(base: Path, request: pytest.FixtureRequest) -> Iterator[PodNetworks]:
    made = PodNetworks(base / secrets.token_hex(4), request.param)
    yield made
    made.end()


def first(sandbox: Sandbox) -> NetworkInterface:
    assert sandbox.network is not None
    return sandbox.network.interfaces[0]


def ip(sandbox: Sandbox, *arguments: str) -> bytes:
    """Run ip(8) in a pod's namespace."""
    assert sandbox.network is not None
    argv = ["ip", "-j", "-n", Path(sandbox.network.netns).name, *arguments]
    return subprocess.run(argv, check=True, capture_output=True).stdout


def links(sandbox: Sandbox) -> set[str]:
    """Return the interfaces in a pod's namespace."""
    return {link["ifname"] for link in msgspec.json.decode(ip(sandbox, "link"))}


def reaches(guest: TapGuest, gateway: str) -> None:
    """Check that a guest reaches the node."""
    assert "1 packets received" in guest.run("busybox", "ping", "-c", "1", "-w", "10", gateway)


def is_reached(guest: TapGuest, address: str) -> None:
    """Check that a big answer comes back over TCP to the pod's address, as port forwarding needs it."""
    size = 300_000
    server = guest.popen("busybox", "nc", "-l", "-p", "7000", "-e", "busybox", "head", "-c", str(size), "/dev/zero")
    try:
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                with socket.socket() as probe:
                    probe.settimeout(10)
                    if probe.connect_ex((address, 7000)) != 0:
                        threading.Event().wait(0.05)
                        continue
                    received = 0
                    while chunk := probe.recv(65536):
                        received += len(chunk)
                    assert received == size
                    return
        raise AssertionError(f"{address}:7000 does not answer")
    finally:
        server.kill()
        server.communicate()


async def test_one_vm_after_the_other(networks: PodNetworks) -> None:
    """Each guest is the pod, also after a restart of the daemon and when a tap is gone."""
    async with networks.pod() as sandbox:
        nic = first(sandbox)
        assert nic.mtu == MTU
        assert nic.tap in links(sandbox)
        for service in (networks.service, networks.restarted()):
            (tap,) = await service.open_taps(sandbox)
            assert tap.name == nic.name
            with tap_guest(nic, tap.fd) as guest:
                tap.close()
                guest.configure(nic, networks.gateway)
                await in_thread(lambda: reaches(guest, networks.gateway))
                await in_thread(lambda: is_reached(guest, nic.addresses[0].partition("/")[0]))
        ip(sandbox, "link", "delete", nic.tap)
        (tap,) = await networks.service.open_taps(sandbox)
        with tap_guest(nic, tap.fd) as guest:
            tap.close()
            guest.configure(nic, networks.gateway)
            await in_thread(lambda: reaches(guest, networks.gateway))


async def test_nobody_is_asked_whether_an_address_is_free(networks: PodNetworks) -> None:
    """IPAM knows; plugins would wait two seconds for the kernel's answer."""
    async with networks.pod() as sandbox:
        assert sandbox.network is not None
        assert await netns.inside(Path(sandbox.network.netns), netns.DETECTION.read_text) == "0\n"


async def test_a_tap_in_use(networks: PodNetworks) -> None:
    async with networks.pod() as sandbox:
        (tap,) = await networks.service.open_taps(sandbox)
        with pytest.raises(
            NetworkError, match=f"the tap {first(sandbox).tap} of the pod's interface eth0 is in use"
        ) as caught:
            await networks.service.open_taps(sandbox)
        assert caught.value.code is Code.FAILED_PRECONDITION
        tap.close()
        (tap,) = await networks.service.open_taps(sandbox)
        tap.close()
    with pytest.raises(NetworkError, match=f"the network of pod {sandbox.id[:13]} is gone"):
        await networks.service.open_taps(sandbox)


async def test_a_tap_is_as_new(networks: PodNetworks) -> None:
    """What one VM had set does not reach the next one's frames."""
    async with networks.pod() as sandbox:
        (tap,) = await networks.service.open_taps(sandbox)
        fcntl.ioctl(tap.fd, taps.TUNSETVNETHDRSZ, struct.pack("i", 12))
        tap.close()
        (tap,) = await networks.service.open_taps(sandbox)
        size = struct.unpack("i", fcntl.ioctl(tap.fd, TUNGETVNETHDRSZ, b"\0" * 4))[0]
        tap.close()
        assert size == taps.VNET_HDR_SIZE


async def test_what_fails_leaves_nothing_open(networks: PodNetworks) -> None:
    """The second interface is gone; the first one's tap can be opened again."""
    before = len(os.listdir("/proc/self/fd"))
    async with networks.pod() as sandbox:
        assert sandbox.network is not None
        lost = msgspec.structs.replace(first(sandbox), name="lost0", tap="vmrt-tap99")
        broken = msgspec.structs.replace(sandbox.network, interfaces=[first(sandbox), lost])
        with pytest.raises(NetworkError, match="lost0"):
            await networks.service.open_taps(msgspec.structs.replace(sandbox, network=broken))
        assert len(os.listdir("/proc/self/fd")) <= before
        (tap,) = await networks.service.open_taps(sandbox)
        tap.close()


async def test_no_program_is_started_but_the_plugins(networks: PodNetworks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would take longer than all that is asked of the kernel for a pod."""
    started: list[str] = []
    start = asyncio.create_subprocess_exec

    async def recorded(program: str, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
        started.append(program)
        return await start(program, *arguments, **options)

    async with networks.pod(SandboxKind.CONTAINER):
        pass  # plugins are asked for their versions once
    monkeypatch.setattr(asyncio, "create_subprocess_exec", recorded)
    async with networks.pod(SandboxKind.CONTAINER):
        pass
    assert started == [f"{PLUGINS}/{networks.plugin}"] * 2


async def test_taps_of_container_pods_go_with_their_vm(networks: PodNetworks) -> None:
    async with networks.pod(SandboxKind.CONTAINER) as sandbox:
        assert first(sandbox).tap
        assert first(sandbox).tap not in links(sandbox)
