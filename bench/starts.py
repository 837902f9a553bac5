"""How soon a sandbox is there, from each source of VMs, beside QEMU alone and beside containerd."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter

from bench.bed import Bed, Source, timed
from bench.client import Client
from bench.raw_boot import boot_once
from bench.records import Record, beside, percentile, record

COLD_ROUNDS = 10
QUICK_ROUNDS = 30
QUICK_RAW_EVERY = 3
OUTPUT_ROUNDS = 20

RAW = "QEMU alone: same machine, kernel and initramfs, to the agent's line"
CONTAINERD = "containerd and runc, the same call"


@dataclasses.dataclass(frozen=True)
class Starts:
    """Milliseconds of RunPodSandbox and of its peers, and the median of each phase."""

    values: list[float] = dataclasses.field(default_factory=list)
    raw: list[float] = dataclasses.field(default_factory=list)
    containerd: list[float] = dataclasses.field(default_factory=list)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def phases_p50(self) -> dict[str, float]:
        """Return the median of each phase that some start had."""
        names = dict.fromkeys(name for one in self.phases for name in one)
        return {name: round(percentile([one.get(name, 0.0) for one in self.phases], 50), 1) for name in names}


def sandbox_start_cold(bed: Bed) -> list[Record]:
    """RunPodSandbox until it answers, when the guest has to boot, beside QEMU alone until the same agent listens."""
    found = _starts(bed, "cold", COLD_ROUNDS, raw_every=1)
    extra = {"beside": [beside(CONTAINERD, found.values, found.containerd)], "phases_p50_ms": found.phases_p50()}
    return [record("sandbox_start_cold", "ms", found.values, peer=RAW, peer_values=found.raw, extra=extra)]


def sandbox_start_template(bed: Bed) -> list[Record]:
    """RunPodSandbox from the template, beside a boot of the same guest: QEMU alone, the quickest that a boot can be."""
    found = _starts(bed, "template", QUICK_ROUNDS, raw_every=QUICK_RAW_EVERY)
    extra = {"beside": [beside(CONTAINERD, found.values, found.containerd)], "phases_p50_ms": found.phases_p50()}
    return [record("sandbox_start_template", "ms", found.values, peer=RAW, peer_values=found.raw, extra=extra)]


def sandbox_start_warm(bed: Bed) -> list[Record]:
    """RunPodSandbox while a VM waits for it, beside containerd's."""
    found = _starts(bed, "warm", QUICK_ROUNDS, raw_every=QUICK_RAW_EVERY)
    extra = {"beside": [beside(RAW, found.values, found.raw)], "phases_p50_ms": found.phases_p50()}
    values, peer_values = found.values, found.containerd
    return [record("sandbox_start_warm", "ms", values, peer=CONTAINERD, peer_values=peer_values, extra=extra)]


def first_output(bed: Bed) -> list[Record]:
    """RunPodSandbox, CreateContainer and StartContainer until the container's first line is in its log."""
    node = bed.node()
    values, peer_values = [], []
    sources: Counter[str] = Counter()
    for _ in range(OUTPUT_ROUNDS):
        node.settle()
        milliseconds, pod = _output(bed.containerd)
        peer_values.append(milliseconds)
        bed.containerd.remove_pod(pod)
        milliseconds, pod = _output(node)
        values.append(milliseconds)
        sources[node.source_of(pod)] += 1
        node.remove_pod(pod)
    extra = {"sources": dict(sources)}
    words = "containerd and runc, the same three calls"
    return [record("first_output", "ms", values, peer=words, peer_values=peer_values, extra=extra)]


def _starts(bed: Bed, source: Source, rounds: int, *, raw_every: int) -> Starts:
    """Start a sandbox many times from one source; measures differ only in how the daemon is configured.

    Raises:
        RuntimeError: A pod's VM came from another source.
    """
    node, found = bed.node(source), Starts()
    size, accelerator = bed.size(), node.accelerator
    _warm_up(bed.containerd, node)
    for number in range(rounds):
        if number % raw_every == 0:
            found.raw.append(boot_once(bed.guest, size, accelerator) * 1000)
        node.settle()
        found.containerd.append(_start(bed.containerd))
        milliseconds, pod = timed(node.run_pod)
        if (actual := node.source_of(pod)) != source:
            raise RuntimeError(f"pod {pod} came from a {actual} VM, not from a {source} one")
        found.values.append(milliseconds)
        found.phases.append(node.info(pod)["phases_ms"])
        node.remove_pod(pod)
    return found


def _warm_up(*clients: Client) -> None:
    """Start one sandbox that does not count: the first reads programs from the disk and makes the bridge."""
    for client in clients:
        _start(client)


def _start(client: Client) -> float:
    """Start and remove a sandbox; return milliseconds of the start."""
    milliseconds, pod = timed(client.run_pod)
    client.remove_pod(pod)
    return milliseconds


def _output(client: Client) -> tuple[float, str]:
    """Return milliseconds until a new pod's container has written a line, and the pod."""
    began = time.monotonic()
    pod = client.run_pod()
    client.run(pod, "hello", ["/bin/sh", "-c", "echo hello; sleep 3600"])
    client.wait_for_line(pod, "hello", b"hello")
    return (time.monotonic() - began) * 1000, pod
