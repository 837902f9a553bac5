"""Containers and commands in a sandbox that is there, beside containerd's."""

from __future__ import annotations

from bench.bed import Bed, timed
from bench.client import Client
from bench.records import Record, beside, percentile, record
from vmruntime.generated import cri_pb2 as cri

CONTAINER_ROUNDS = 30
CRUN_EVERY = 3
EXEC_ROUNDS = 50


def container_start(bed: Bed) -> list[Record]:
    """CreateContainer and StartContainer, beside containerd's and beside `crun run true` in the same guest."""
    node, peer = bed.node(), bed.containerd
    values, bare, peer_values, creates = [], [], [], []
    with node.pod(privileged=True) as pod, peer.pod() as peer_pod:
        tool = node.run(pod, "tool", ["sleep", "3600"], privileged=True)
        for number in range(CONTAINER_ROUNDS):
            if number % CRUN_EVERY == 0:
                bare.append(_bare_crun(node, tool, number))
            peer_values.append(sum(_container(peer, peer_pod, number)))
            created, started = _container(node, pod, number)
            values.append(created + started)
            creates.append(created)
    extra = {
        "beside": [beside("crun run true in the same guest", values, bare)],
        "over_crun_ms": round(percentile(values, 50) - percentile(bare, 50), 1),
        "create_p50_ms": round(percentile(creates, 50), 1),
    }
    words = "containerd and runc, the same two calls"
    return [record("container_start", "ms", values, peer=words, peer_values=peer_values, extra=extra)]


def exec_sync(bed: Bed) -> list[Record]:
    """ExecSync of `true`, which is a new process each time, beside containerd's."""
    node, peer = bed.node(), bed.containerd
    values, peer_values = [], []
    with node.pod() as pod, peer.pod() as peer_pod:
        container, peer_container = (
            client.run(where, "exec", ["sleep", "3600"]) for client, where in ((node, pod), (peer, peer_pod))
        )
        for _ in range(EXEC_ROUNDS):
            peer_values.append(_exec(peer, peer_container))
            values.append(_exec(node, container))
    words = "containerd and runc, the same call"
    return [record("exec_sync", "ms", values, peer=words, peer_values=peer_values)]


def _container(client: Client, pod: str, number: int) -> tuple[float, float]:
    """Create, start and remove a container; return milliseconds of the first two."""
    created, container = timed(client.create, pod, f"c{number}", ["sleep", "3600"])
    started, _ = timed(client.start, container)
    client.remove(container)
    return created, started


def _bare_crun(client: Client, tool: str, number: int) -> float:
    """Return milliseconds of one `crun run`, from five in a row: the guest's clock counts in hundredths of a second."""
    run = f"crun --root /tmp/crun --cgroup-manager=disabled run -b /bundle b{number}-$i"
    script = f"mkdir -p /tmp/crun; cat /proc/uptime; for i in 1 2 3 4 5; do {run}; done; cat /proc/uptime"
    before, after = (float(line.split()[0]) for line in client.exec(tool, script).splitlines())
    return (after - before) * 1000 / 5


def _exec(client: Client, container: str) -> float:
    request = cri.ExecSyncRequest(container_id=container, cmd=["/bin/true"], timeout=30)
    return timed(client.runtime.ExecSync, request)[0]
