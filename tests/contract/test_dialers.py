"""What every way to an agent does: a unix socket, a hybrid socket (fake and real), the kernel's vsock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from tests.support.hosts import GUEST, qemu_hypervisor, short_directory
from vmruntime.agent.client import AgentClient
from vmruntime.agent.errors import AgentGone
from vmruntime.agent.fake_guest import FakeGuest
from vmruntime.agent.fake_server import BootingGuest, FakeAgentServer
from vmruntime.agent.interface import AGENT_PORT
from vmruntime.agent.relay import Dialer, HybridDialer, Relay, UnixDialer, VsockDialer
from vmruntime.aio.detached import ProcessIdentity
from vmruntime.hypervisor.fake import FakeHypervisor
from vmruntime.hypervisor.interface import Hypervisor, KernelBoot, VirtualMachine, VmSpec, VsockTransport
from vmruntime.hypervisor.vsock import native_works
from vmruntime.model.resources import VmSize

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE = 60.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""How an HTTP/2 client begins (RFC 9113, section 3.4): what listens here is a gRPC server, and it answers settings."""


class Way(msgspec.Struct):
    """A dialer to an agent that listens, and one to a port where nobody does.

    Attributes:
        fragile: Why a dial must not be given up half-way, when it must not.
    """

    dialer: Dialer
    refused: Dialer
    fragile: str = ""


@contextlib.asynccontextmanager
async def unix(base: Path) -> AsyncIterator[Way]:
    guest = FakeGuest()
    server = FakeAgentServer(guest)
    await server.start(base / "agent")
    yield Way(UnixDialer(base / "agent"), UnixDialer(base / "nobody"))
    await guest.die()
    await server.stop()


@contextlib.asynccontextmanager
async def hybrid_fake(base: Path) -> AsyncIterator[Way]:
    hypervisor = FakeHypervisor(lambda spec: BootingGuest(FakeGuest()))
    async with booted(base, hypervisor) as vm:
        path = Path(vm.handle.vsock)
        yield Way(HybridDialer(path, AGENT_PORT), HybridDialer(path, AGENT_PORT + 1))
    await hypervisor.close()


@contextlib.asynccontextmanager
async def hybrid_vm(base: Path) -> AsyncIterator[Way]:
    hypervisor = qemu_hypervisor()
    if hypervisor.transport is not VsockTransport.VHOST_USER:
        pytest.skip("this host uses the kernel's vhost-vsock")
    async with booted(base, hypervisor) as vm:
        path = Path(vm.handle.vsock)
        fragile = "vhost-device-vsock 0.3 may forward nothing any more after connections given up in the handshake"
        yield Way(HybridDialer(path, AGENT_PORT), HybridDialer(path, AGENT_PORT + 1), fragile)


@contextlib.asynccontextmanager
async def native_vm(base: Path) -> AsyncIterator[Way]:
    if not native_works():
        pytest.skip("this host has no vhost-vsock")
    async with booted(base, qemu_hypervisor()) as vm:
        yield Way(VsockDialer(vm.handle.cid, AGENT_PORT), VsockDialer(vm.handle.cid, AGENT_PORT + 1))


@contextlib.asynccontextmanager
async def booted(base: Path, hypervisor: Hypervisor) -> AsyncIterator[VirtualMachine]:
    async def record(role: str, identity: ProcessIdentity) -> None:
        return

    base.joinpath("vm").mkdir()
    base.joinpath("vm").chmod(0o711)
    spec = VmSpec(
        id="d" * 64,
        size=VmSize(vcpus=1, memory_mib=128),
        boot=KernelBoot(kernel=GUEST / "vmlinuz", initramfs=GUEST / "initramfs.img"),
        directory=base / "vm",
        cid=7900,
    )
    vm = await hypervisor.start(spec, record)
    try:
        async with asyncio.timeout(PATIENCE):
            await vm.wait_for_console("vmruntime-agent: ready")
        yield vm
    finally:
        await vm.kill()


IMPLEMENTATIONS = [
    pytest.param(unix, id="unix"),
    pytest.param(hybrid_fake, id="hybrid-fake"),
    pytest.param(hybrid_vm, id="hybrid-vm", marks=pytest.mark.vm),
    pytest.param(native_vm, id="native-vm", marks=pytest.mark.vm),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=IMPLEMENTATIONS)
async def way(request: pytest.FixtureRequest) -> AsyncIterator[Way]:
    """A way to an agent for the module."""
    with short_directory() as directory:
        async with request.param(directory) as way:
            yield way


async def test_a_connection_reaches_the_agent_byte_for_byte(way: Way) -> None:
    loop = asyncio.get_running_loop()
    with await way.dialer.dial() as connection:
        assert connection.getblocking() is False
        assert os.get_inheritable(connection.fileno()) is False
        async with asyncio.timeout(PATIENCE):
            await loop.sock_sendall(connection, PREFACE)
            answer = await loop.sock_recv(connection, 4096)
    assert answer[3:4] == b"\x04", "the first frame is SETTINGS: nothing of the handshake is left in the stream"


async def test_nobody_listens(way: Way) -> None:
    async with asyncio.timeout(PATIENCE):
        with pytest.raises((ConnectionError, FileNotFoundError)):
            await way.refused.dial()


async def test_a_cancelled_dial_closes_what_it_opened(way: Way) -> None:
    if way.fragile:
        pytest.skip(way.fragile)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        dialling = asyncio.ensure_future(way.dialer.dial())
        await asyncio.sleep(0)
        dialling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await dialling).close()
    await asyncio.sleep(0.2)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the other end of the last one may still be closing


async def test_the_real_client_talks_through_a_relay(way: Way, base: Path) -> None:
    relay = Relay(base / "relay.sock", way.dialer)
    await relay.open()
    assert (base / "relay.sock").stat().st_mode & 0o777 == 0o600
    clients = [AgentClient(base / "relay.sock") for _ in range(3)]
    async with asyncio.timeout(PATIENCE):
        hellos = await asyncio.gather(*(client.hello() for client in clients for _ in range(5)))
    assert len({hello.version for hello in hellos}) == 1
    await relay.close()
    assert not (base / "relay.sock").exists()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(AgentGone):
            await clients[0].hello()
    for client in clients:
        await client.close()


async def test_a_relay_to_nobody_ends_connections(way: Way, base: Path) -> None:
    relay = Relay(base / "relay.sock", way.refused)
    await relay.open()
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, str(base / "relay.sock"))
        async with asyncio.timeout(PATIENCE):
            assert await loop.sock_recv(connection, 1) == b""
    await relay.close()
