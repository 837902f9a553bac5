"""Bytes between a pod and the host: a VM's tap beside a container's veth pair, by the same CNI plugins and programs."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from bench.bed import Bed
from bench.client import Client
from bench.records import Record, beside, record

ROUNDS = 7
MIB = 1024 * 1024
BYTES = 64 * MIB
CHUNK = 256 * 1024
SEND_PORT, TAKE_PORT = 7001, 7002
SERVE = (
    f"dd if=/dev/zero of=/zeros bs=64k count={BYTES // 65536}; httpd -p {SEND_PORT} -h /;"
    f" while :; do nc -l -p {TAKE_PORT} > /dev/null; done"
)
PATIENCE = 30.0

Transfer = Callable[[str], int]


def net_throughput(bed: Bed) -> list[Record]:
    """What a pod sends to the host over TCP, and what it takes, beside the same container of containerd."""
    node, peer = bed.node(), bed.containerd
    rates: dict[tuple[str, str], list[float]] = {}
    with node.pod() as pod, peer.pod() as peer_pod:
        addresses = {"veth": _serve(peer, peer_pod), "tap": _serve(node, pod)}
        for number in range(ROUNDS + 1):
            for name, address in addresses.items():
                for direction, transfer in (("send", _fetch), ("take", _push)):
                    rate = _rate(transfer, address)
                    if number:  # the first round waits for the servers
                        rates.setdefault((name, direction), []).append(rate)
    to_pod = rates["tap", "take"]
    words = "a container's veth pair on the same kind of bridge, same programs"
    more = beside(words, to_pod, rates["veth", "take"], what="to the pod")
    extra = {"beside": [more], "mib_a_round": BYTES // MIB}
    values, peer_values = rates["tap", "send"], rates["veth", "send"]
    return [record("net_throughput", "MiB/s", values, peer=words, peer_values=peer_values, extra=extra)]


def _serve(client: Client, pod: str) -> str:
    """Start the two servers in a pod and return its address."""
    client.run(pod, "serve", ["/bin/sh", "-c", SERVE])
    return client.address(pod)


def _rate(transfer: Transfer, address: str) -> float:
    """Return MiB a second of a transfer; whoever does not listen yet is asked again."""
    end = time.monotonic() + PATIENCE
    while True:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            if (count := transfer(address)) >= BYTES:
                return BYTES / MIB / (time.monotonic() - began)
            if time.monotonic() > end:
                raise RuntimeError(f"{address}: {count} bytes of {BYTES}")
        if time.monotonic() > end:
            raise TimeoutError(f"nobody listens at {address}")
        time.sleep(0.05)


def _fetch(address: str) -> int:
    """Get the file from the pod's web server; return how many bytes came, headers included."""
    buffer, count = bytearray(CHUNK), 0
    with socket.create_connection((address, SEND_PORT), timeout=PATIENCE) as connection:
        connection.sendall(b"GET /zeros HTTP/1.0\r\n\r\n")
        while received := connection.recv_into(buffer):
            count += received
    return count


def _push(address: str) -> int:
    """Send bytes to the pod and wait until it has taken the last of them."""
    chunk = bytes(CHUNK)
    with socket.create_connection((address, TAKE_PORT), timeout=PATIENCE) as connection:
        for _ in range(BYTES // CHUNK):
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(CHUNK):
            pass
    return BYTES
