"""The measures; each returns records. Rounds of a measure and its peers alternate, so all see the same machine."""

from __future__ import annotations

from collections.abc import Callable

from bench.bed import Bed
from bench.containers import container_start, exec_sync
from bench.image_pods import image_pod_memory, image_pod_start
from bench.load import event_loop_stall, ten_pods_at_once
from bench.memory import memory
from bench.network import net_throughput
from bench.pulls import image_pull
from bench.reads import guest_read, virtiofs_read
from bench.records import Record
from bench.seeded import listing_with_200_pods
from bench.starts import first_output, sandbox_start_cold, sandbox_start_template, sandbox_start_warm
from bench.throughput import exec_throughput, port_forward_throughput


def listing(bed: Bed) -> list[Record]:
    """List and Status calls with 200 pods in the store."""
    bed.rest()
    return listing_with_200_pods(bed.base / "seeded")


Measure = Callable[[Bed], list[Record]]

MEASURES: dict[str, Measure] = {
    "sandbox_start_cold": sandbox_start_cold,
    "sandbox_start_template": sandbox_start_template,
    "sandbox_start_warm": sandbox_start_warm,
    "first_output": first_output,
    "container_start": container_start,
    "exec_sync": exec_sync,
    "exec_throughput": exec_throughput,
    "port_forward_throughput": port_forward_throughput,
    "net_throughput": net_throughput,
    "guest_read": guest_read,
    "virtiofs_read": virtiofs_read,
    "pss_idle_pod": memory,
    "daemon_rss_20_pods": memory,
    "event_loop_stall": event_loop_stall,
    "ten_pods_at_once": ten_pods_at_once,
    "image_pull": image_pull,
    "list_200_pods": listing,
    "status_200_pods": listing,
    "image_pod_start": image_pod_start,
    "pss_idle_image_pod": image_pod_memory,
}
"""What makes each record, by the record's name; some make two in one go. Those that share a daemon follow each other."""
