"""What idle pods take of the host's memory, beside containerd's."""

from __future__ import annotations

import time

from bench.bed import Bed
from bench.processes import by_program, field, pod_memory, shim_memory
from bench.records import Record, percentile, record
from vmruntime.generated import cri_pb2 as cri

IDLE_PODS = 20
SETTLE_SECONDS = 2.0


def memory(bed: Bed) -> list[Record]:
    """Proportional set size of idle pods by process, and the daemon's resident memory while it has them."""
    node, peer = bed.node(), bed.containerd
    pods = [node.run_pod() for _ in range(IDLE_PODS)]
    peer_pods = [peer.run_pod() for _ in range(IDLE_PODS)]
    time.sleep(SETTLE_SECONDS)
    found = [pod_memory(pod) for pod in pods]
    if not all(one.guest for one in found):
        raise RuntimeError("a pod has no process with a guest's memory in its cgroup")
    containers = [shim_memory(pod) for pod in peer_pods]
    for _ in range(20):
        node.runtime.ListPodSandbox(cri.ListPodSandboxRequest())
    sources = node.sources_of(pods)
    resident = field(node.daemon.pid, "status", "VmRSS:") / 1024
    for client, some in ((node, pods), (peer, peer_pods)):
        for pod in some:
            client.remove_pod(pod)
    extra = {
        **by_program(found),
        "guest_mib": round(percentile([one.guest for one in found], 50), 1),
        "guest_file_mib": round(percentile([one.guest_file for one in found], 50), 1),
        "translated_code_mib": round(percentile([one.code for one in found], 50), 1),
        "sources": sources,
        "containerd": by_program(containers),
    }
    values, peer_values = [one.total for one in found], [one.total for one in containers]
    words = "containerd's idle pod: shim and pause container"
    return [
        record("pss_idle_pod", "MiB", values, peer=words, peer_values=peer_values, extra=extra),
        record("daemon_rss_20_pods", "MiB", [resident], extra={"pods": IDLE_PODS}),
    ]
