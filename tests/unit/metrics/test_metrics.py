"""The metrics endpoint."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from vmruntime.errors import Unavailable
from vmruntime.metrics.instruments import OPERATIONS, REGISTRY, StateCollector, observe_start
from vmruntime.metrics.server import MetricsServer


def test_everything_measured_is_served() -> None:
    OPERATIONS.labels("Version", "OK").observe(0.002)
    observe_start({"guest": 1500.0})
    server = MetricsServer("127.0.0.1", 0, REGISTRY)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5).read().decode()
        assert 'vmruntime_cri_operation_seconds_count{code="OK",method="Version"}' in text
        assert 'vmruntime_sandbox_start_seconds_sum{phase="guest"} 1.5' in text
        assert "vmruntime_leaks_total 0.0" in text
        with pytest.raises(Unavailable, match=r"metrics.port: 127.0.0.1"):
            MetricsServer("127.0.0.1", server.port, REGISTRY)
    finally:
        server.close()


def test_states_are_counted_when_asked() -> None:
    registry = CollectorRegistry()
    pods = {"ready": 2}
    registry.register(StateCollector(lambda: (pods, {})))
    pods["ready"] = 3
    assert registry.get_sample_value("vmruntime_pods", {"state": "ready"}) == 3
