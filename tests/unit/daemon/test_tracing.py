"""Spans of a daemon with guests in memory, as a real collector gets them."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc
import msgspec
import pytest

from tests.support.collector import Collected, Collector, collector
from tests.support.fake_daemon import fake_parts
from tests.unit.daemon.serving import exited, pod_config, put_image, serving
from vmruntime import tracing
from vmruntime.aio.faults import Faults
from vmruntime.config.checks import problems
from vmruntime.config.settings import Settings, TracingSettings
from vmruntime.daemon.parts import Parts
from vmruntime.errors import FailedPrecondition
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import maintenance_pb2 as own
from vmruntime.generated.maintenance_pb2_grpc import PodTracesStub
from vmruntime.hypervisor.fake import FakeHypervisor

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
UNSAMPLED = (("traceparent", f"00-{TRACE}-{CALLER}-00"),)
SERVICE = "runtime.v1.RuntimeService"


@pytest.fixture
def collecting() -> Iterator[Collector]:
    with collector() as running:
        yield running


def traced(settings: Settings, endpoint: str, rate: int = 0) -> Settings:
    return msgspec.structs.replace(settings, tracing=TracingSettings(endpoint=endpoint, sampling_rate_per_million=rate))


async def life(stub: Any, settings: Settings, image: str, metadata: Any) -> tuple[str, str]:
    """Run a pod with a container from start to removal."""
    config = pod_config(settings, "web")
    pod = (await stub.RunPodSandbox(cri.RunPodSandboxRequest(config=config), metadata=metadata)).pod_sandbox_id
    container = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="app"),
        image=cri.ImageSpec(image=image, user_specified_image="busybox:1"),
        command=["/bin/sh", "-c", "exit 0"],
        linux=cri.LinuxContainerConfig(),
    )
    request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
    created = (await stub.CreateContainer(request, metadata=metadata)).container_id
    await stub.StartContainer(cri.StartContainerRequest(container_id=created), metadata=metadata)
    await exited(stub, created)
    await stub.RemoveContainer(cri.RemoveContainerRequest(container_id=created), metadata=metadata)
    await stub.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod), metadata=metadata)
    await stub.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod), metadata=metadata)
    return pod, created


async def test_kubelets_trace_goes_on_and_phases_nest(settings: Settings, parts: Parts, collecting: Collector) -> None:
    image = await put_image(settings)
    async with serving(traced(settings, collecting.address), parts) as stub:
        pod, container = await life(stub, settings, image.id, SAMPLED)
    spans = collecting.spans()  # all have arrived: the daemon sends the last ones before it ends
    assert {one.trace for one in spans} == {TRACE}
    calls = {one.attributes["rpc.method"]: one for one in spans if one.parent == CALLER}
    assert list(calls) == [
        "RunPodSandbox", "CreateContainer", "StartContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"
    ]  # fmt: skip

    def parts_of(whole: Collected) -> list[str]:
        found = [one for one in spans if one.parent == whole.id]
        assert all(one.within(whole) for one in found)
        return sorted(one.name for one in found if one.name != "store.write")

    run = calls["RunPodSandbox"]
    assert run.name == f"{SERVICE}/RunPodSandbox"
    assert parts_of(run) == ["sandbox.boot", "sandbox.network", "sandbox.setup"]
    (boot,) = (one for one in spans if one.name == "sandbox.boot")
    assert parts_of(boot) == ["vm.agent", "vm.nic", "vm.prepare", "vm.qemu"]
    assert parts_of(calls["CreateContainer"]) == [
        "container.create", "container.layers", "container.spec", "container.volumes"
    ]  # fmt: skip
    assert parts_of(calls["StartContainer"]) == ["container.start"]
    assert parts_of(calls["RemoveContainer"]) == ["container.delete", "container.detach"]
    written = [one for one in spans if one.name == "store.write"]
    assert {one.parent for one in written} > {run.id, calls["CreateContainer"].id, calls["StartContainer"].id}
    stopping = ["sandbox.containers", "sandbox.network", "sandbox.release", "sandbox.shutdown"]
    assert parts_of(calls["StopPodSandbox"]) == stopping

    pods = {"k8s.pod.name": "web", "k8s.namespace.name": "n", "k8s.pod.uid": "u", "vmruntime.sandbox.id": pod}
    for call in calls.values():
        assert call.attributes.items() >= pods.items(), call.name
        assert (call.attributes["rpc.system"], call.attributes["rpc.grpc.status_code"]) == ("grpc", 0)
        assert not call.failed
    for method in ("CreateContainer", "StartContainer", "RemoveContainer"):
        about = calls[method].attributes
        assert (about["container.id"], about["k8s.container.name"]) == (container, "app")
        assert about["container.image.name"] == "busybox:1"
    assert run.resource["service.name"] == "vmruntime"
    assert run.resource["host.name"]


async def test_who_decides_what_is_traced(settings: Settings, parts: Parts, collecting: Collector) -> None:
    version = cri.VersionRequest()
    async with serving(traced(settings, collecting.address), parts) as stub:
        await stub.Version(version)
        await stub.Version(version, metadata=UNSAMPLED)
        await stub.Version(version, metadata=(("traceparent", "nonsense"),))
    assert collecting.spans() == []
    async with serving(traced(settings, collecting.address, rate=1_000_000), parts) as stub:
        await stub.Version(version)
        await stub.Version(version, metadata=UNSAMPLED)
        async for _ in stub.StreamContainers(cri.StreamContainersRequest(), metadata=SAMPLED):
            pass
    # The first Version is that of serving() itself, which waits for the daemon.
    names = [one.name for one in collecting.spans() if one.trace != TRACE]
    assert names == [f"{SERVICE}/Version"] * 2
    assert [one.name for one in collecting.spans(TRACE)] == [f"{SERVICE}/StreamContainers"]


async def test_failures_are_told_with_the_part_that_failed(settings: Settings, collecting: Collector) -> None:
    faults = Faults()
    parts = fake_parts(faults)
    async with serving(traced(settings, collecting.address), parts) as stub:
        faults.fail("network.add", RuntimeError("with a secret"))
        config = pod_config(settings, "web")
        with pytest.raises(grpc.RpcError):
            await stub.RunPodSandbox(cri.RunPodSandboxRequest(config=config), metadata=SAMPLED)
        with pytest.raises(grpc.RpcError):
            await stub.StartContainer(cri.StartContainerRequest(container_id="none"), metadata=SAMPLED)
        with pytest.raises(grpc.RpcError):
            await stub.CreateContainer(cri.CreateContainerRequest(), metadata=SAMPLED)
    assert isinstance(parts.hypervisor, FakeHypervisor)
    await parts.hypervisor.close()
    spans = {one.name.rpartition("/")[2]: one for one in collecting.spans(TRACE)}
    assert (spans["sandbox.network"].failed, spans["sandbox.network"].message) == (True, "RuntimeError")
    assert "secret" not in spans["RunPodSandbox"].message
    assert spans["RunPodSandbox"].failed
    assert spans["RunPodSandbox"].attributes["rpc.grpc.status_code"] == grpc.StatusCode.INTERNAL.value[0]
    missing = spans["StartContainer"]
    assert (missing.failed, missing.attributes["rpc.grpc.status_code"]) == (False, grpc.StatusCode.NOT_FOUND.value[0])
    assert spans["CreateContainer"].failed


async def traces(settings: Settings) -> dict[str, tuple[bool, list[own.TracedCall]]]:
    """Return whether each pod is gone, and the calls on it."""
    async with grpc.aio.insecure_channel(f"unix:{settings.run}/vmruntime.sock") as channel:
        stub = PodTracesStub(channel)
        pods = (await stub.ListTracedPods(own.ListTracedPodsRequest())).pods
        return {
            pod.pod_sandbox_id: (
                pod.gone,
                list((await stub.GetPodTrace(own.GetPodTraceRequest(pod_sandbox_id=pod.pod_sandbox_id))).calls),
            )
            for pod in pods
        }


async def test_calls_are_recorded_without_a_collector(settings: Settings, parts: Parts) -> None:
    image = await put_image(settings)
    async with serving(settings, parts) as stub:
        pod, container = await life(stub, settings, image.id, None)
        gone, calls = (await traces(settings))[pod]
    assert gone
    methods = [
        "RunPodSandbox",
        "CreateContainer",
        "StartContainer",
        "RemoveContainer",
        "StopPodSandbox",
        "RemovePodSandbox",
    ]
    assert [one.whole.name for one in calls] == methods
    assert [one.container_id for one in calls] == ["", *[container] * 3, "", ""]
    assert {one.container_name for one in calls} == {"", "app"}
    run = calls[0].whole
    assert run.attributes["k8s.pod.name"] == "web"
    boot, network = (next(one for one in run.parts if one.name == name) for name in ("sandbox.boot", "sandbox.network"))
    assert max(boot.start_ns, network.start_ns) < min(one.start_ns + one.duration_ns for one in (boot, network))
    assert [one.name for one in boot.parts] == ["vm.prepare", "vm.qemu", "vm.agent", "vm.nic"]
    assert "vm.scratch" in [one.name for one in boot.parts[0].parts]
    for call in calls:
        assert call.whole.duration_ns > 0
        assert not call.whole.going_on
        assert (
            sum(one.duration_ns for one in call.whole.parts if one.name != "sandbox.network") <= call.whole.duration_ns
        )


async def test_a_start_that_failed_can_be_explained_afterwards(settings: Settings) -> None:
    faults = Faults()
    parts = fake_parts(faults)
    async with serving(settings, parts) as stub:
        faults.fail("network.add", FailedPrecondition("no address is free"))
        with pytest.raises(grpc.RpcError):
            await stub.RunPodSandbox(cri.RunPodSandboxRequest(config=pod_config(settings, "web")))
        found = [calls for gone, calls in (await traces(settings)).values() if gone and calls[0].whole.error]
    assert isinstance(parts.hypervisor, FakeHypervisor)
    await parts.hypervisor.close()
    (call,) = found[-1]
    assert call.whole.error == "no address is free"
    errors = {one.name: one.error for one in call.whole.parts if one.error}
    assert errors == {"sandbox.network": "no address is free", "sandbox.boot": "cancelled"}


async def test_a_collector_that_is_away_is_no_hindrance(
    settings: Settings, parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with caplog.at_level(logging.WARNING):
        async with serving(traced(settings, nobody, rate=1_000_000), parts) as stub:
            for _ in range(20):
                await stub.Version(cri.VersionRequest())
            began = time.monotonic()
        # Its own deadline is 5 s, its library's 30 s; other parts of a daemon's end take far less than 2.
        assert time.monotonic() - began < 4.5
    assert len([record for record in caplog.records if record.name.startswith("opentelemetry")]) <= 1


def test_without_tracing_nothing_of_it_is_loaded() -> None:
    code = (
        "import sys, vmruntime.daemon.main; "
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not tracing.exporting()
    with tracing.span("nothing"):
        tracing.annotate({"a": "b"})


@pytest.mark.parametrize(
    ("endpoint", "fine"),
    [
        ("localhost:4317", True),
        ("https://otel.example:4317", True),
        ("http://[::1]:4317/", True),
        ("localhost", False),
        ("grpc://x:1", False),
        ("x:port", False),
        ("http://x:4317/v1/traces", False),
        ("http://user@x:4317", False),
    ],
)
def test_endpoints(endpoint: str, fine: bool) -> None:
    complaints = [one for one in problems(traced(Settings(), endpoint)) if "tracing" in one.message]
    assert (complaints == []) is fine
