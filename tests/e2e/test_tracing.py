"""One trace from a caller through a real daemon: an image from a registry, a pod in a real VM, its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import registry as reg
from tests.support.collector import Collected, Collector, collector
from tests.support.daemon import Daemon, running_daemon, sandbox_config
from tests.support.registry import build_image, files
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)


@pytest.fixture
def collecting() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture
def node(base: Path, tmp_path: Path, collecting: Collector) -> Iterator[Daemon]:
    with reg.registry(tmp_path / "registry") as server:
        server.push(build_image(tmp_path / "l", [files({"a": b"a"}), files({"b": b"b"})]), "app:1")
        conf = reg.registries_conf(tmp_path / "r.conf", {"registry.example": server.address})
        extra = f'[images]\nregistries_conf = "{conf}"\n[tracing]\nendpoint = "{collecting.address}"\n'
        extra += '[start]\nsource = "cold"\n'  # so that it is known what the start consists of
        with running_daemon(base / "traced", extra) as daemon:
            yield daemon


def test_a_callers_trace_goes_through_the_daemon(node: Daemon, collecting: Collector) -> None:
    pull = cri.PullImageRequest(image=cri.ImageSpec(image="registry.example/app:1"))
    node.images.PullImage(pull, metadata=SAMPLED)
    request = cri.RunPodSandboxRequest(config=sandbox_config("traced", node.base))
    pod = node.runtime.RunPodSandbox(request, metadata=SAMPLED).pod_sandbox_id
    node.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod), metadata=SAMPLED)
    node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    collecting.wait("runtime.v1.RuntimeService/StopPodSandbox")
    spans = collecting.spans()
    assert {one.trace for one in spans} == {TRACE}  # the other calls came without a trace

    def parts_of(name: str) -> list[Collected]:
        (whole,) = (one for one in spans if one.name.rpartition("/")[2] == name)
        found = [one for one in spans if one.parent == whole.id]
        assert all(one.within(whole) for one in found)
        return [one for one in found if one.name != "store.write"]

    assert [one.name for one in parts_of("PullImage")] == ["image.resolve", "image.fetch"]
    assert [one.name for one in parts_of("image.fetch")] == ["image.layer"] * 2
    started = {one.name: one for one in parts_of("RunPodSandbox")}
    assert set(started) == {"sandbox.network", "sandbox.boot", "sandbox.setup"}
    assert started["sandbox.network"].start < started["sandbox.boot"].end  # CNI runs while the VM boots
    assert [one.name for one in parts_of("sandbox.boot")] == ["vm.prepare", "vm.qemu", "vm.agent", "vm.nic"]
    assert [one.name for one in parts_of("vm.qemu")][-2:] == ["vm.process", "vm.monitor"]
    assert {"cni.bridge", "vm.scratch", "vm.plug_nic"} <= {one.name for one in spans}
    assert len([one for one in parts_of("sandbox.setup") if one.name.startswith("guest.")]) > 2
    assert {one.name for one in parts_of("StopPodSandbox")} >= {"sandbox.network", "sandbox.shutdown"}
    (run,) = (one for one in spans if one.name.endswith("/RunPodSandbox"))
    assert (run.parent, run.attributes["k8s.pod.name"], run.attributes["vmruntime.sandbox.id"]) == (
        CALLER,
        "traced",
        pod,
    )
