from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from tests.unit.cri.conftest import Rig, container_config, sandbox_config
from tests.unit.cri.fakes import IMAGE_ID
from vmruntime.errors import Aborted, DeadlineExceeded, FailedPrecondition
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import cri_pb2_grpc
from vmruntime.model.container import ContainerState, ContainerUser
from vmruntime.model.stats import ContainerUsage
from vmruntime.pods.interface import ExecResult, PodEvent, PodEventKind

Code = grpc.StatusCode


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_version(rig: Rig) -> None:
    answer = await rig.runtime.Version(cri.VersionRequest(version="0.1.0"))
    assert (answer.version, answer.runtime_name, answer.runtime_api_version) == ("0.1.0", "vmruntime", "v1")
    assert answer.runtime_version


async def test_status_names_conditions_handlers_and_features(rig: Rig) -> None:
    answer = await rig.runtime.Status(cri.StatusRequest())
    runtime, network = answer.status.conditions
    assert (runtime.type, runtime.status) == ("RuntimeReady", True)
    assert (network.type, network.status, network.reason) == ("NetworkReady", False, "NetworkPluginNotReady")
    assert "CNI" in network.message
    assert [handler.name for handler in answer.runtime_handlers] == ["", "container"]
    assert {one.name: one.features.user_namespaces for one in answer.runtime_handlers}["container"]
    assert answer.features.supplemental_groups_policy
    assert not answer.info
    assert (await rig.runtime.Status(cri.StatusRequest(verbose=True))).info == {"accelerator": '"kvm"'}


async def test_runtime_config(rig: Rig) -> None:
    answer = await rig.runtime.RuntimeConfig(cri.RuntimeConfigRequest())
    assert answer.linux.cgroup_driver == cri.CGROUPFS


async def test_update_runtime_config(rig: Rig) -> None:
    def request(cidr: str) -> cri.UpdateRuntimeConfigRequest:
        return cri.UpdateRuntimeConfigRequest(
            runtime_config=cri.RuntimeConfig(network_config=cri.NetworkConfig(pod_cidr=cidr))
        )

    await rig.runtime.UpdateRuntimeConfig(cri.UpdateRuntimeConfigRequest())
    assert rig.node_network.told == []
    await rig.runtime.UpdateRuntimeConfig(request("10.1.0.0/24,fd00::/64"))
    assert rig.node_network.told == [["10.1.0.0/24", "fd00::/64"]]
    code, details = await refused(rig.runtime.UpdateRuntimeConfig(request("nonsense")))
    assert (code, "pod_cidr" in details) == (Code.INVALID_ARGUMENT, True)
    rig.node_network.fail = FailedPrecondition("the template is gone")
    code, details = await refused(rig.runtime.UpdateRuntimeConfig(request("10.1.0.0/24")))
    assert (code, details) == (Code.FAILED_PRECONDITION, "the template is gone")


async def test_life_of_a_sandbox(rig: Rig) -> None:
    sandbox_id = await rig.sandbox(labels={"app": "web"}, annotations={"a": "b"})
    status = await rig.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True))
    assert status.status.state == cri.SANDBOX_READY
    assert status.status.network.ip == "10.1.0.2"
    assert [one.ip for one in status.status.network.additional_ips] == ["fd00::2"]
    assert (status.status.metadata.name, status.status.metadata.attempt) == ("web", 1)
    assert (status.status.labels, status.status.annotations) == ({"app": "web"}, {"a": "b"})
    assert status.timestamp > status.status.created_at > 1e18
    info = json.loads(status.info["info"])
    assert (info["kernel"], info["phases_ms"]["boot"], info["kind"]) == ("6.12.0", 300.0, "container")
    assert info["network_check"] == "as it was made"
    await rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=sandbox_id))
    status = await rig.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id))
    assert (status.status.state, status.status.network.ip, len(status.info)) == (cri.SANDBOX_NOTREADY, "", 0)
    await rig.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id))
    code, _ = await refused(rig.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id)))
    assert code is Code.NOT_FOUND


async def test_a_taken_sandbox_name_and_its_remedy(rig: Rig) -> None:
    await rig.sandbox()
    code, details = await refused(rig.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=sandbox_config())))
    assert code is Code.ALREADY_EXISTS
    assert details == "config.metadata: the name is taken (remove the other one)"


async def test_stop_and_remove_of_unknown_ids_succeed(rig: Rig) -> None:
    unknown = "f" * 64
    await rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=unknown))
    await rig.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=unknown))
    await rig.runtime.StopContainer(cri.StopContainerRequest(container_id=unknown, timeout=1))
    await rig.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=unknown))


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("RunPodSandbox", cri.RunPodSandboxRequest(), "config"),
        ("RunPodSandbox", cri.RunPodSandboxRequest(config=cri.PodSandboxConfig()), "config.metadata"),
        ("StopPodSandbox", cri.StopPodSandboxRequest(), "pod_sandbox_id"),
        ("RemovePodSandbox", cri.RemovePodSandboxRequest(), "pod_sandbox_id"),
        ("PodSandboxStatus", cri.PodSandboxStatusRequest(), "pod_sandbox_id"),
        ("CreateContainer", cri.CreateContainerRequest(), "pod_sandbox_id"),
        ("StartContainer", cri.StartContainerRequest(), "container_id"),
        ("StopContainer", cri.StopContainerRequest(), "container_id"),
        ("StopContainer", cri.StopContainerRequest(container_id="x", timeout=-1), "timeout"),
        ("RemoveContainer", cri.RemoveContainerRequest(), "container_id"),
        ("ContainerStatus", cri.ContainerStatusRequest(), "container_id"),
        ("ContainerStatus", cri.ContainerStatusRequest(container_id="a\0b"), "container_id"),
        ("ExecSync", cri.ExecSyncRequest(cmd=["x"]), "container_id"),
        ("ExecSync", cri.ExecSyncRequest(container_id="x"), "cmd"),
        ("ExecSync", cri.ExecSyncRequest(container_id="x", cmd=["y"], timeout=-5), "timeout"),
        ("ReopenContainerLog", cri.ReopenContainerLogRequest(), "container_id"),
        ("ContainerStats", cri.ContainerStatsRequest(), "container_id"),
    ],
)
async def test_missing_fields_are_named(rig: Rig, method: str, request_: Any, field: str) -> None:
    code, details = await refused(getattr(rig.runtime, method)(request_))
    assert code is Code.INVALID_ARGUMENT
    assert details.startswith(field)


async def test_life_of_a_container(rig: Rig) -> None:
    sandbox_id = await rig.sandbox()
    container_id = await rig.container(sandbox_id, labels={"x": "y"}, annotations={"c": "d"})
    await rig.runtime.StartContainer(cri.StartContainerRequest(container_id=container_id))
    rig.pods.change(container_id, user=ContainerUser(uid=1000, gid=1001, groups=[1002]), stop_signal=3)
    answer = await rig.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container_id, verbose=True))
    status = answer.status
    assert status.state == cri.CONTAINER_RUNNING
    assert (status.started_at > status.created_at, status.finished_at) == (True, 0)
    assert (status.image.image, status.image.user_specified_image) == ("sha256:abc", "busybox:1")
    assert (status.image_id, status.image_ref.split("@")[0]) == (IMAGE_ID, "docker.io/library/busybox")
    assert status.log_path == "/var/log/pods/web/main/0.log"
    assert (status.labels, status.annotations) == ({"x": "y"}, {"c": "d"})
    user = status.user.linux
    assert (user.uid, user.gid, user.supplemental_groups) == (1000, 1001, [1001, 1002])
    assert status.stop_signal == cri.SIGNAL_SIGQUIT
    assert json.loads(answer.info["info"])["pid"] == 42
    await rig.runtime.StopContainer(cri.StopContainerRequest(container_id=container_id, timeout=7))
    assert rig.pods.calls[-1] == ("stop_container", container_id, 7.0)
    status = (await rig.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container_id))).status
    assert (status.state, status.exit_code, status.reason, status.message) == (
        cri.CONTAINER_EXITED, 137, "Error", "killed",
    )  # fmt: skip
    of_pod = await rig.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id))
    assert [one.id for one in of_pod.containers_statuses] == [container_id]
    code, _ = await refused(rig.runtime.StartContainer(cri.StartContainerRequest(container_id=container_id)))
    assert code is Code.FAILED_PRECONDITION
    await rig.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container_id))
    code, _ = await refused(rig.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container_id)))
    assert code is Code.NOT_FOUND


async def test_a_container_of_an_unknown_sandbox(rig: Rig) -> None:
    request = cri.CreateContainerRequest(pod_sandbox_id="f" * 64, config=container_config())
    assert (await refused(rig.runtime.CreateContainer(request)))[0] is Code.NOT_FOUND


async def test_a_container_name_twice(rig: Rig) -> None:
    sandbox_id = await rig.sandbox()
    request = cri.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=cri.ContainerConfig())
    code, details = await refused(rig.runtime.CreateContainer(request))
    assert (code, details) == (Code.INVALID_ARGUMENT, "config.metadata is required")


async def test_lists_streams_and_filters(rig: Rig) -> None:
    first, second = await rig.sandbox("one", labels={"app": "a"}), await rig.sandbox("two", labels={"app": "b"})
    await rig.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=first))

    async def ids(**filter_: Any) -> list[str]:
        wanted = cri.PodSandboxFilter(**filter_)
        listed = await rig.runtime.ListPodSandbox(cri.ListPodSandboxRequest(filter=wanted))
        streamed = [
            item.id
            async for piece in rig.runtime.StreamPodSandboxes(cri.StreamPodSandboxesRequest(filter=wanted))
            for item in piece.pod_sandboxes
        ]
        assert [item.id for item in listed.items] == streamed
        return streamed

    assert await ids() == [first, second]
    assert await ids(id=second[:4]) == [second]
    assert await ids(label_selector={"app": "a"}) == [first]
    assert await ids(label_selector={"app": "a", "other": "x"}) == []
    assert await ids(state=cri.PodSandboxStateValue(state=cri.SANDBOX_NOTREADY)) == [first]
    assert await ids(id=second, state=cri.PodSandboxStateValue(state=cri.SANDBOX_NOTREADY)) == []


async def test_container_lists_streams_and_filters(rig: Rig) -> None:
    pod, other = await rig.sandbox("one"), await rig.sandbox("two")
    first = await rig.container(pod, "first", labels={"app": "a"})
    second = await rig.container(pod, "second", labels={"app": "b"})
    third = await rig.container(other, "third")
    await rig.runtime.StartContainer(cri.StartContainerRequest(container_id=second))

    async def ids(**filter_: Any) -> list[str]:
        wanted = cri.ContainerFilter(**filter_)
        listed = await rig.runtime.ListContainers(cri.ListContainersRequest(filter=wanted))
        streamed = [
            item.id
            async for piece in rig.runtime.StreamContainers(cri.StreamContainersRequest(filter=wanted))
            for item in piece.containers
        ]
        assert [item.id for item in listed.containers] == streamed
        return streamed

    assert await ids() == [first, second, third]
    assert await ids(pod_sandbox_id=other[:4]) == [third]
    assert await ids(state=cri.ContainerStateValue(state=cri.CONTAINER_RUNNING)) == [second]
    assert await ids(label_selector={"app": "a"}) == [first]
    assert await ids(id=third[:4], pod_sandbox_id=pod) == []
    code, _ = await refused(
        rig.runtime.ListContainers(
            cri.ListContainersRequest(filter=cri.ContainerFilter(state=cri.ContainerStateValue(state=77)))  # type: ignore[arg-type]
        )
    )
    assert code is Code.INVALID_ARGUMENT


async def test_a_long_stream_comes_in_pieces(rig: Rig) -> None:
    pod = await rig.sandbox()
    made = [await rig.container(pod, f"c{i}", annotations={"big": "x" * 600_000}) for i in range(5)]
    pieces = [piece async for piece in rig.runtime.StreamContainers(cri.StreamContainersRequest())]
    assert len(pieces) == 5
    assert [item.id for piece in pieces for item in piece.containers] == made


async def test_short_ids(rig: Rig) -> None:
    first, _ = await rig.sandbox("one"), await rig.sandbox("two")
    status = await rig.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=first[:4]))
    assert status.status.id == first
    code, details = await refused(rig.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id="000")))
    assert (code, "several ids" in details) == (Code.INVALID_ARGUMENT, True)
    code, _ = await refused(rig.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id="9")))
    assert code is Code.NOT_FOUND


async def test_exec_sync(rig: Rig) -> None:
    container_id = await rig.container(await rig.sandbox())
    request = cri.ExecSyncRequest(container_id=container_id, cmd=["ls", "-l"], timeout=9)
    answer = await rig.runtime.ExecSync(request)
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out", b"err", 3)
    assert rig.pods.calls[-1] == ("exec_sync", container_id, ["ls", "-l"], 9.0)
    rig.pods.fail = DeadlineExceeded("the command took longer than 9 s")
    assert (await refused(rig.runtime.ExecSync(request)))[0] is Code.DEADLINE_EXCEEDED


async def test_exec_sync_output_fits_one_message(rig: Rig) -> None:
    container_id = await rig.container(await rig.sandbox())
    limit = 16 * 1024 * 1024
    rig.pods.exec_result = ExecResult(stdout=b"o" * limit, stderr=b"e" * limit, exit_code=0)
    answer = await rig.runtime.ExecSync(cri.ExecSyncRequest(container_id=container_id, cmd=["yes"]))
    assert len(answer.stdout) == len(answer.stderr) == (limit - 4096) // 2


async def test_reopen_log(rig: Rig) -> None:
    container_id = await rig.container(await rig.sandbox())
    request = cri.ReopenContainerLogRequest(container_id=container_id)
    assert (await refused(rig.runtime.ReopenContainerLog(request)))[0] is Code.FAILED_PRECONDITION
    await rig.runtime.StartContainer(cri.StartContainerRequest(container_id=container_id))
    await rig.runtime.ReopenContainerLog(request)


async def test_stats(rig: Rig) -> None:
    pod = await rig.sandbox()
    running, created = await rig.container(pod, "a"), await rig.container(pod, "b")
    await rig.runtime.StartContainer(cri.StartContainerRequest(container_id=running))
    rig.pods.usage_by_id[running] = ContainerUsage(
        id=running, time=5, cpu_ns=100, memory_usage=300, memory_working_set=200, memory_limit=1000, writable_bytes=77
    )
    one = (await rig.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=running))).stats
    assert (one.attributes.id, one.attributes.metadata.name) == (running, "a")
    assert (one.cpu.timestamp, one.cpu.usage_core_nano_seconds.value) == (5, 100)
    assert (one.memory.available_bytes.value, one.memory.working_set_bytes.value) == (800, 200)
    assert (one.writable_layer.used_bytes.value, one.writable_layer.fs_id.mountpoint) == (77, "/var/lib/vmruntime/pods")
    idle = (await rig.runtime.ContainerStats(cri.ContainerStatsRequest(container_id=created))).stats
    assert (idle.attributes.id, idle.HasField("cpu")) == (created, False)
    listed = await rig.runtime.ListContainerStats(cri.ListContainerStatsRequest())
    assert [stats.attributes.id for stats in listed.stats] == [running]
    wanted = cri.ContainerStatsFilter(id=created)
    assert not (await rig.runtime.ListContainerStats(cri.ListContainerStatsRequest(filter=wanted))).stats
    streamed = [piece async for piece in rig.runtime.StreamContainerStats(cri.StreamContainerStatsRequest())]
    assert [stats.attributes.id for piece in streamed for stats in piece.container_stats] == [running]
    unknown = rig.runtime.ContainerStats(cri.ContainerStatsRequest(container_id="f" * 64))
    assert (await refused(unknown))[0] is Code.NOT_FOUND


async def test_events(rig: Rig) -> None:
    pod = await rig.sandbox()
    container_id = await rig.container(pod)
    container = rig.pods.container(container_id)
    call = rig.runtime.GetContainerEvents(cri.GetEventsRequest())
    rig.pods.queue.put_nowait(
        PodEvent(
            kind=PodEventKind.STARTED, id=container_id, time=9, sandbox=rig.pods.sandbox(pod), containers=[container]
        )
    )
    event = await call.read()
    assert (event.container_id, event.container_event_type, event.created_at) == (
        container_id, cri.CONTAINER_STARTED_EVENT, 9,
    )  # fmt: skip
    assert event.pod_sandbox_status.id == pod
    assert [one.id for one in event.containers_statuses] == [container_id]
    rig.pods.queue.put_nowait(PodEvent(kind=PodEventKind.DELETED, id=pod, time=10, sandbox=None, containers=[]))
    event = await call.read()
    assert (event.container_event_type, event.HasField("pod_sandbox_status")) == (cri.CONTAINER_DELETED_EVENT, False)
    rig.pods.queue.put_nowait(Aborted("this listener fell too far behind"))
    assert (await refused(call.read()))[0] is Code.ABORTED


async def test_a_client_that_leaves_ends_its_event_stream(rig: Rig) -> None:
    call = rig.runtime.GetContainerEvents(cri.GetEventsRequest())
    reading = asyncio.ensure_future(call.read())
    await asyncio.wait_for(rig.pods.listening.wait(), 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    async with asyncio.timeout(5):
        while rig.pods.listeners:
            await asyncio.sleep(0.01)


NOT_BUILT = [
    ("CheckpointContainer", {"container_id": "c1", "location": "/x"}, ["container_id: 'c1'", "CRIU"]),
    ("CheckpointPod", {"pod_sandbox_id": "s1", "output_path": "/x"}, ["pod_sandbox_id: 's1'", "virtio-fs"]),
    ("RestorePod", {"checkpoint_path": "/x"}, ["checkpoint_path: '/x'", "virtio-fs"]),
]


@pytest.mark.parametrize(("name", "fields", "words"), NOT_BUILT)
async def test_what_is_not_built_says_why(rig: Rig, name: str, fields: dict[str, Any], words: list[str]) -> None:
    method = cri.DESCRIPTOR.services_by_name["RuntimeService"].methods_by_name[name]
    code, details = await refused(getattr(rig.runtime, name)(getattr(cri, method.input_type.name)(**fields)))
    assert code is Code.UNIMPLEMENTED
    assert all(word in details for word in [*words, "save its state in a volume"]), details


async def test_every_method_is_ours(rig: Rig) -> None:
    from vmruntime.cri.image_service import ImageService
    from vmruntime.cri.runtime_service import RuntimeService

    for service, ours, base in (
        ("RuntimeService", RuntimeService, cri_pb2_grpc.RuntimeServiceServicer),
        ("ImageService", ImageService, cri_pb2_grpc.ImageServiceServicer),
    ):
        for method in cri.DESCRIPTOR.services_by_name[service].methods:
            assert getattr(ours, method.name) is not getattr(base, method.name), method.name


async def test_states_only_the_store_knows_show_as_the_nearest(rig: Rig) -> None:
    container_id = await rig.container(await rig.sandbox())
    for state, shown in (
        (ContainerState.UNKNOWN, cri.CONTAINER_UNKNOWN),
        (ContainerState.REMOVING, cri.CONTAINER_EXITED),
    ):
        rig.pods.change(container_id, state=state)
        answer = await rig.runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container_id))
        assert answer.status.state == shown
