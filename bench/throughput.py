"""Bytes through exec and port-forward, each beside the same bytes by a shorter way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from bench.bed import Bed
from bench.client import Client
from bench.records import Record, beside, record
from vmruntime.agent.client import AgentClient
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.streams import ExecSpec
from vmruntime.streaming.client import open_spdy

ROUNDS = 5
MIB = 1024 * 1024
BYTES = 16 * MIB
WORDS = ["/bin/dd", "if=/dev/zero", "bs=64k", f"count={BYTES // 65536}"]
PORT = 7000
SERVE = f"{' '.join(WORDS)} of=/zeros; exec httpd -f -p {PORT} -h /"
ASK = b"GET /zeros HTTP/1.0\r\n\r\n"
PATIENCE = 60.0

Transfer = Callable[[], Awaitable[int]]


def exec_throughput(bed: Bed) -> list[Record]:
    """What a command writes, through CRI's Exec and SPDY, beside the agent's own Exec over the same relay and vsock."""
    node, peer = bed.node(), bed.containerd
    with node.pod() as pod, peer.pod() as peer_pod:
        container = node.run(pod, "exec", ["sleep", "3600"])
        peer_container = peer.run(peer_pod, "exec", ["sleep", "3600"])
        socket = Path(node.daemon.run) / "sandboxes" / pod[:13] / "agent.sock"

        async def through_agent() -> int:
            agent = AgentClient(socket)
            try:
                async with agent.exec(ExecSpec(container_id=container, argv=WORDS)) as command:
                    return await _count(chunk.data async for chunk in command.output() if not chunk.stderr)
            finally:
                await agent.close()

        values, agents, containerds = _alternate(
            _exec_through(node, container), through_agent, _exec_through(peer, peer_container)
        )
        pipe = _pipe_in_guest(node, container)
    words = "the agent's Exec over the same relay and vsock"
    extra = {
        "mib_a_round": BYTES // MIB,
        "pipe_in_guest_mib_s": round(pipe, 1),
        "beside": [beside("containerd and runc, the same stream", values, containerds)],
    }
    return [record("exec_throughput", "MiB/s", values, peer=words, peer_values=agents, extra=extra)]


def port_forward_throughput(bed: Bed) -> list[Record]:
    """What a port sends, through CRI's PortForward and SPDY, beside TCP to the pod's address."""
    node, peer = bed.node(), bed.containerd
    with node.pod() as pod, peer.pod() as peer_pod:
        for client, where in ((node, pod), (peer, peer_pod)):
            client.run(where, "serve", ["/bin/sh", "-c", SERVE])
        address = node.address(pod)

        async def direct() -> int:
            reader, writer = await asyncio.open_connection(address, PORT)
            try:
                writer.write(ASK)
                return await _count(iter_reads(lambda: reader.read(65536)))
            finally:
                writer.close()
                await writer.wait_closed()

        values, directs, containerds = _alternate(
            _until_it_listens(_forwarded(node, pod)),
            _until_it_listens(direct),
            _until_it_listens(_forwarded(peer, peer_pod)),
        )
    more = beside("containerd and runc, the same stream", values, containerds)
    extra = {"beside": [more], "mib_a_round": BYTES // MIB}
    words = "TCP to the pod's address, through tap and bridge"
    return [record("port_forward_throughput", "MiB/s", values, peer=words, peer_values=directs, extra=extra)]


def _exec_through(client: Client, container: str) -> Transfer:
    """Return a transfer through CRI's Exec."""

    async def transfer() -> int:
        request = cri.ExecRequest(container_id=container, cmd=WORDS, stdout=True)
        url = client.runtime.Exec(request).url
        async with open_spdy(url, ["v4.channel.k8s.io"]) as (session, _):
            await session.open({"streamType": "error"})
            stdout = await session.open({"streamType": "stdout"})
            return await _count(iter_reads(stdout.read))

    return transfer


def _forwarded(client: Client, pod: str) -> Transfer:
    """Return a transfer through CRI's PortForward."""

    async def transfer() -> int:
        request = cri.PortForwardRequest(pod_sandbox_id=pod, port=[PORT])
        url = client.runtime.PortForward(request).url
        async with open_spdy(url, ["portforward.k8s.io"]) as (session, _):
            headers = {"port": str(PORT), "requestID": "0"}
            error = await session.open({"streamType": "error", **headers})
            await error.close_write()
            data = await session.open({"streamType": "data", **headers})
            await data.write(ASK)
            return await _count(iter_reads(data.read))

    return transfer


async def iter_reads(read: Callable[[], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    """Iterate over what a read function returns, to the empty one."""
    while data := await read():
        yield data


async def _count(chunks: AsyncIterator[bytes]) -> int:
    return sum([len(chunk) async for chunk in chunks])


def _until_it_listens(transfer: Transfer) -> Transfer:
    """Try again while nobody listens: the server has just been started."""

    async def tried() -> int:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                received = await transfer()
            except ConnectionError:
                received = 0
            if received >= BYTES or time.monotonic() > end:
                return received
            await asyncio.sleep(0.05)

    return tried


def _alternate(*transfers: Transfer) -> list[list[float]]:
    """Return the rates of each, in MiB a second, rounds alternating; the first round warms up and is not counted."""
    rates: list[list[float]] = [[] for _ in transfers]
    for number in range(ROUNDS + 1):
        for one, found in zip(transfers, rates, strict=True):
            rate = asyncio.run(_rate(one))
            if number:
                found.append(rate)
    return rates


async def _rate(transfer: Transfer) -> float:
    loop, began = asyncio.get_running_loop(), time.monotonic()
    async with asyncio.timeout_at(loop.time() + PATIENCE):
        received = await transfer()
    if received < BYTES:
        raise RuntimeError(f"{received} bytes came, not {BYTES}")
    return BYTES / MIB / (time.monotonic() - began)


def _pipe_in_guest(client: Client, container: str) -> float:
    """Return what a pipe between two processes of the guest carries, in MiB a second."""
    count = 4 * BYTES
    script = f"cat /proc/uptime; dd if=/dev/zero bs=64k count={count // 65536} | cat > /dev/null; cat /proc/uptime"
    before, after = (float(line.split()[0]) for line in client.exec(container, script).splitlines())
    return count / MIB / max(after - before, 0.01)
