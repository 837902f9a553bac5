"""The metrics endpoint."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from vmruntime.aio.beside import beside
from vmruntime.errors import Unavailable
from vmruntime.metrics.instruments import (
    OPERATIONS,
    RECOVERED,
    REGISTRY,
    Inventory,
    InventoryCollector,
    observe_start,
)
from vmruntime.metrics.loop import measure_lag
from vmruntime.metrics.server import MetricsServer

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "observability.md"


def test_everything_measured_is_served() -> None:
    OPERATIONS.labels("Version", "OK").observe(0.002)
    observe_start({"guest": 1500.0}, "cold")
    RECOVERED.labels("adopted").inc()
    server = MetricsServer("127.0.0.1", 0, REGISTRY)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5).read().decode()
        assert 'vmruntime_cri_operation_seconds_count{code="OK",method="Version"}' in text
        assert re.search(r'vmruntime_sandbox_start_seconds_sum\{phase="guest"\} [\d.]+', text)
        for name in ("leaks", "release_failures", "sandbox_deaths", "containers_oom_killed"):
            assert f"\nvmruntime_{name}_total " in text
        assert re.search(r'vmruntime_sandboxes_recovered_total\{outcome="gone"\} [\d.]+', text)
        assert "process_resident_memory_bytes" in text
        with pytest.raises(Unavailable, match=r"metrics.port: 127.0.0.1"):
            MetricsServer("127.0.0.1", server.port, REGISTRY)
    finally:
        server.close()


def test_what_there_is_is_counted_when_asked() -> None:
    registry = CollectorRegistry()
    pods = {"ready": 2}
    about = {"version": "1", "accelerator": "kvm", "vsock": "native"}
    registry.register(InventoryCollector(lambda: Inventory(pods=pods, images=4, image_bytes=4096, about=about)))
    pods["ready"] = 3
    assert registry.get_sample_value("vmruntime_pods", {"state": "ready"}) == 3
    assert registry.get_sample_value("vmruntime_images") == 4
    assert registry.get_sample_value("vmruntime_image_bytes") == 4096
    assert registry.get_sample_value("vmruntime_info", about) == 1


async def test_a_loop_that_is_held_up_is_late() -> None:
    def late() -> float:
        held_up = REGISTRY.get_sample_value("vmruntime_event_loop_lag_seconds_bucket", {"le": "0.05"})
        return (REGISTRY.get_sample_value("vmruntime_event_loop_lag_seconds_count") or 0) - (held_up or 0)

    before = late()
    async with asyncio.timeout(20):
        async with beside(measure_lag()):
            while late() == before:
                await asyncio.sleep(0)
                time.sleep(0.2)  # noqa: ASYNC251 (to be late is the point)


def test_every_metric_is_documented() -> None:
    registry = CollectorRegistry()
    registry.register(InventoryCollector(Inventory))
    suffix = {"counter": "_total", "info": "_info"}
    ours = [family for one in (REGISTRY, registry) for family in one.collect()]
    names = {family.name + suffix.get(family.type, "") for family in ours if family.name.startswith("vmruntime")}
    table = [line for line in DOCUMENTATION.read_text().splitlines() if line.startswith("| `vmruntime_")]
    assert {name for line in table for name in re.findall(r"`(vmruntime_\w+)`", line.split("|")[1])} == names
