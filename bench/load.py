"""Many pods at once, and what the daemon's event loop makes of it."""

from __future__ import annotations

import concurrent.futures
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bench.bed import Bed, timed
from bench.raw_boot import boot_once
from bench.records import Record, histogram_quantile, record
from tests.support.load import MeasuredDaemon, measured_daemon
from vmruntime.hypervisor.interface import Accelerator

T = TypeVar("T")

TEN = 10
ROUNDS = 3
LIVES = 8
LIVES_AT_ONCE = 4
LAG = "vmruntime_event_loop_lag_seconds"


def ten_pods_at_once(bed: Bed) -> list[Record]:
    """Ten calls of RunPodSandbox at once, until the last one is answered, beside ten QEMUs alone at once."""
    accelerator = Accelerator(bed.accelerator)
    values, raw = [], []
    for _ in range(ROUNDS):
        raw.append(timed(_at_once, TEN, lambda: boot_once(bed.guest, bed.size(), accelerator))[0])
        milliseconds, pods = timed(_at_once, TEN, bed.run_pod)
        values.append(milliseconds)
        with concurrent.futures.ThreadPoolExecutor(TEN) as pool:
            list(pool.map(bed.remove_pod, pods))
    peer = "ten QEMUs alone at once, to the last agent's line"
    return [record("ten_pods_at_once", "ms", values, peer=peer, peer_values=raw)]


def event_loop_stall(bed: Bed) -> list[Record]:
    """How late tasks of the daemon come to their turn while pods start, are used and go, several at once.

    Twice: with VMs, which compete for the same processors, and without, which leaves what the daemon does to itself.
    """
    buckets = _lag_while(bed.measured, lambda: _lives(bed, "vm"))
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        with measured_daemon(Path(name) / "d", fake=True) as node:
            alone = Bed(node, Path(name))
            without = _lag_while(node, lambda: _lives(alone, "fake"))
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


def _lives(bed: Bed, name: str) -> None:
    def one() -> None:
        pod = bed.run_pod()
        container = bed.create(pod, name, ["/bin/sh", "-c", "sleep 3600"])
        bed.start(container)
        bed.exec(container, "true")
        bed.remove(container)
        bed.remove_pod(pod)

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
