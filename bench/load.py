"""Many pods at once, and what the daemon's event loop makes of it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import grpc

from bench.bed import Bed, Node, timed
from bench.client import Client
from bench.records import Record, beside, histogram_quantile, record
from tests.support.load import MeasuredDaemon, measured_daemon

T = TypeVar("T")

TEN = 10
ROUNDS = 5
LIVES = 8
LIVES_AT_ONCE = 4
LAG = "vmruntime_event_loop_lag_seconds"


def ten_pods_at_once(bed: Bed) -> list[Record]:
    """Ten calls of RunPodSandbox at once, until the last one is answered, beside one; and containerd's ten.

    Twice: with the daemon's own choice of where VMs come from, and with all of them from the template.
    """
    words = "one pod alone on the same daemon"
    found = _ten(bed, bed.node())
    more = [beside("containerd and runc, ten at once", found.ten, found.containerd)]
    templates = _ten(bed, bed.node("template"))
    more.append(beside(words, templates.ten, templates.one, what="all from the template"))
    extra = {"beside": more, "sources": dict(found.sources)}
    return [record("ten_pods_at_once", "ms", found.ten, peer=words, peer_values=found.one, extra=extra)]


@dataclasses.dataclass(frozen=True)
class _Ten:
    """Milliseconds of ten at once, of one alone and of containerd's ten; and where the VMs of the ten came from."""

    ten: list[float] = dataclasses.field(default_factory=list)
    one: list[float] = dataclasses.field(default_factory=list)
    containerd: list[float] = dataclasses.field(default_factory=list)
    sources: Counter[str] = dataclasses.field(default_factory=Counter)


def _ten(bed: Bed, node: Node) -> _Ten:
    """Start ten at once and one alone, rounds alternating."""
    found = _Ten()
    for _ in range(ROUNDS):
        milliseconds, pods = _run_ten(bed.containerd)
        found.containerd.append(milliseconds)
        _remove(bed.containerd, pods)
        node.settle()
        milliseconds, pod = timed(node.run_pod)
        found.one.append(milliseconds)
        node.remove_pod(pod)
        node.settle()
        milliseconds, pods = _run_ten(node)
        found.ten.append(milliseconds)
        found.sources.update(node.sources_of(pods))
        _remove(node, pods)
    return found


def _run_ten(client: Client) -> tuple[float, list[str]]:
    milliseconds, pods = timed(_at_once, TEN, client.run_pod)
    return milliseconds, pods


def _remove(client: Client, pods: list[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(TEN) as pool:
        list(pool.map(client.remove_pod, pods))


def event_loop_stall(bed: Bed) -> list[Record]:
    """How late tasks of the daemon come to their turn while pods start, are used and go, several at once.

    Twice: with VMs, which compete for the same processors, and without, which leaves what the daemon does to itself.
    """
    node = bed.node()
    buckets = _lag_while(node.measured, lambda: _lives(node, "vm"))
    with (
        measured_daemon(bed.base / "fake", fake=True) as measured,
        grpc.insecure_channel(f"unix:{measured.daemon.socket}") as channel,
    ):
        alone = Node(channel, measured, bed.layout, "auto")
        without = _lag_while(measured, lambda: _lives(alone, "fake"))
    extra = {
        "samples": int(buckets[-1][1]),
        "without_vms_p50_ms": round(histogram_quantile(without, 0.5), 2),
        "without_vms_p99_ms": round(histogram_quantile(without, 0.99), 2),
    }
    p50, p99 = histogram_quantile(buckets, 0.5), histogram_quantile(buckets, 0.99)
    return [
        Record(
            measure="event_loop_stall",
            unit="ms",
            p50=round(p50, 3),
            p99=round(p99, 3),
            rounds=LIVES * LIVES_AT_ONCE,
            extra=extra,
        )
    ]


def _lives(client: Client, name: str) -> None:
    def one() -> None:
        with client.pod() as pod:
            container = client.run(pod, name, ["/bin/sh", "-c", "sleep 3600"])
            client.exec(container, "true")
            client.remove(container)

    def several() -> None:
        for _ in range(LIVES):
            one()

    _at_once(LIVES_AT_ONCE, several)


def _at_once(count: int, work: Callable[[], T]) -> list[T]:
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(work) for _ in range(count)]]


def _lag_while(node: MeasuredDaemon, work: Callable[[], None]) -> list[tuple[float, float]]:
    """Return the buckets of the lag's histogram while something is done: (upper bound in ms, samples up to it)."""
    before = _buckets(node)
    work()
    return [(bound * 1000, count - before[bound]) for bound, count in sorted(_buckets(node).items())]


def _buckets(node: MeasuredDaemon) -> dict[float, float]:
    samples = node.metrics()[f"{LAG}_bucket"]
    return {float(dict(labels)["le"]): count for labels, count in samples.items()}
