"""A CRI daemon in memory, behind a real gRPC server: containers are small scripts of log lines."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc

from tests.unit.cli.fake_streams import FakeStreams
from vmruntime.generated import cri_pb2, cri_pb2_grpc, maintenance_pb2, maintenance_pb2_grpc
from vmruntime.ids import new_id
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec


@dataclasses.dataclass
class Script:
    """What a container does: lines of (stream, tag, text), then its end."""

    lines: list[tuple[str, str, bytes]] = dataclasses.field(default_factory=list)
    exit_code: int = 0
    reason: str = "Completed"
    message: str = ""
    forever: bool = False
    delay: float = 0.0


class FakeCri(
    cri_pb2_grpc.RuntimeServiceServicer,
    cri_pb2_grpc.ImageServiceServicer,
    maintenance_pb2_grpc.ImageMaintenanceServicer,
    maintenance_pb2_grpc.MachineMaintenanceServicer,
    maintenance_pb2_grpc.PodTracesServicer,
):
    """State is plain attributes; tests read and write them."""

    def __init__(self) -> None:
        self.pods: dict[str, cri_pb2.PodSandboxStatus] = {}
        self.containers: dict[str, cri_pb2.ContainerStatus] = {}
        self.pod_of: dict[str, str] = {}
        self.pod_configs: dict[str, cri_pb2.PodSandboxConfig] = {}
        self.container_configs: dict[str, cri_pb2.ContainerConfig] = {}
        self.images: dict[str, cri_pb2.Image] = {}
        self.uses: dict[str, maintenance_pb2.ImageUse] = {}
        self.script = Script()
        self.calls: list[str] = []
        self.requests: dict[str, Any] = {}
        self.failures: dict[str, tuple[grpc.StatusCode, str]] = {}
        self.hooks: dict[str, Callable[[], None]] = {}
        self.exec_answer = cri_pb2.ExecSyncResponse()
        self.info: dict[str, str] = {}
        self.pod_info: dict[str, Any] = {"pid": 7}
        self.machines: list[tuple[str, str]] = []
        self.traced: list[maintenance_pb2.TracedPod] = []
        self.traces: dict[str, list[maintenance_pb2.TracedCall]] = {}
        self._ended: dict[str, threading.Event] = {}
        self._threads: list[threading.Thread] = []
        # A streaming server; it logs when it starts, so that is before any command whose output counts.
        self.streams = FakeStreams()

    def close(self) -> None:
        self.streams.close()
        for event in self._ended.values():
            event.set()
        for thread in self._threads:
            thread.join(5)

    def _enter(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls.append(name)
        self.requests[name] = request
        if name in self.hooks:
            self.hooks[name]()
        if name in self.failures:
            context.abort(*self.failures[name])

    # --- setting the stage

    def add_image(self, name: str = "docker.io/library/busybox:1", letter: str = "a") -> cri_pb2.Image:
        image = cri_pb2.Image(id=f"sha256:{letter * 64}", repo_tags=[name], size=5 * 2**20)
        self.images[image.id] = image
        return image

    def add_pod(self, name: str, *, pod_id: str = "", ready: bool = True, created: int = 1) -> str:
        pod_id = pod_id or new_id()
        state = cri_pb2.SANDBOX_READY if ready else cri_pb2.SANDBOX_NOTREADY
        self.pods[pod_id] = cri_pb2.PodSandboxStatus(
            id=pod_id,
            metadata=cri_pb2.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default"),
            state=state,
            created_at=created,
            network=cri_pb2.PodSandboxNetworkStatus(ip="10.88.0.2"),
        )
        self.pod_configs[pod_id] = cri_pb2.PodSandboxConfig()
        return pod_id

    def add_container(
        self, pod_id: str, name: str, *, exit_code: int | None = None, log: Path | None = None, created: int = 1
    ) -> str:
        container_id = new_id()
        running = exit_code is None
        self.containers[container_id] = cri_pb2.ContainerStatus(
            id=container_id,
            metadata=cri_pb2.ContainerMetadata(name=name),
            state=cri_pb2.CONTAINER_RUNNING if running else cri_pb2.CONTAINER_EXITED,
            exit_code=exit_code or 0,
            reason="" if running else "Completed",
            created_at=created,
            log_path=str(log or ""),
            image=cri_pb2.ImageSpec(image="busybox"),
        )
        self.pod_of[container_id] = pod_id
        self._ended[container_id] = threading.Event()
        return container_id

    def end(self, container_id: str, exit_code: int, reason: str = "Error", message: str = "") -> None:
        status = self.containers[container_id]
        if status.state != cri_pb2.CONTAINER_EXITED:
            status.exit_code, status.reason, status.message = exit_code, reason, message
            status.state = cri_pb2.CONTAINER_EXITED
        self._ended[container_id].set()

    # --- RuntimeService

    def Version(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.VersionResponse:
        self._enter("Version", request, context)
        return cri_pb2.VersionResponse(
            version="0.1.0", runtime_name="fake", runtime_version="9.9", runtime_api_version="v1"
        )

    def Status(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.StatusResponse:
        self._enter("Status", request, context)
        ready = cri_pb2.RuntimeCondition(type="RuntimeReady", status=True)
        return cri_pb2.StatusResponse(status=cri_pb2.RuntimeStatus(conditions=[ready]))

    def RunPodSandbox(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.RunPodSandboxResponse:
        self._enter("RunPodSandbox", request, context)
        pod_id = self.add_pod(request.config.metadata.name, created=time.time_ns())
        self.pods[pod_id].metadata.CopyFrom(request.config.metadata)
        self.pods[pod_id].annotations.update(request.config.annotations)
        self.pod_configs[pod_id] = request.config
        return cri_pb2.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    def StopPodSandbox(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.StopPodSandboxResponse:
        self._enter("StopPodSandbox", request, context)
        if request.pod_sandbox_id in self.pods:
            for container_id, pod_id in self.pod_of.items():
                if pod_id == request.pod_sandbox_id:
                    self.end(container_id, 137)
            self.pods[request.pod_sandbox_id].state = cri_pb2.SANDBOX_NOTREADY
        return cri_pb2.StopPodSandboxResponse()

    def RemovePodSandbox(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.RemovePodSandboxResponse:
        self._enter("RemovePodSandbox", request, context)
        self.pods.pop(request.pod_sandbox_id, None)
        for container_id in [c for c, p in self.pod_of.items() if p == request.pod_sandbox_id]:
            del self.containers[container_id], self.pod_of[container_id]
        return cri_pb2.RemovePodSandboxResponse()

    def PodSandboxStatus(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.PodSandboxStatusResponse:
        self._enter("PodSandboxStatus", request, context)
        status = self.pods.get(request.pod_sandbox_id) or self._unknown(request.pod_sandbox_id, context)
        return cri_pb2.PodSandboxStatusResponse(
            status=status, info={"info": json.dumps(self.pod_info), "text": "not json"}
        )

    def ListPodSandbox(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.ListPodSandboxResponse:
        self._enter("ListPodSandbox", request, context)
        items = [
            cri_pb2.PodSandbox(
                id=pod.id,
                metadata=pod.metadata,
                state=pod.state,
                created_at=pod.created_at,
                annotations=pod.annotations,
            )
            for pod in self.pods.values()
        ]
        return cri_pb2.ListPodSandboxResponse(items=items)

    def CreateContainer(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.CreateContainerResponse:
        self._enter("CreateContainer", request, context)
        log = Path(self.pod_configs[request.pod_sandbox_id].log_directory) / request.config.log_path
        container_id = self.add_container(
            request.pod_sandbox_id, request.config.metadata.name, log=log, created=time.time_ns()
        )
        self.containers[container_id].state = cri_pb2.CONTAINER_CREATED
        self.container_configs[container_id] = request.config
        return cri_pb2.CreateContainerResponse(container_id=container_id)

    def StartContainer(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.StartContainerResponse:
        self._enter("StartContainer", request, context)
        self.containers[request.container_id].state = cri_pb2.CONTAINER_RUNNING
        thread = threading.Thread(target=self._play, args=(request.container_id,))
        self._threads.append(thread)
        thread.start()
        return cri_pb2.StartContainerResponse()

    def _play(self, container_id: str) -> None:
        script = self.script
        with open(self.containers[container_id].log_path, "ab", buffering=0) as log:
            for stream, tag, text in script.lines:
                self._ended[container_id].wait(script.delay)
                log.write(f"2026-01-02T03:04:05.000000006Z {stream} {tag} ".encode() + text + b"\n")
        if script.forever:
            self._ended[container_id].wait(20)
        self.end(container_id, script.exit_code, script.reason, script.message)

    def StopContainer(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.StopContainerResponse:
        self._enter("StopContainer", request, context)
        self.end(request.container_id, 143)
        return cri_pb2.StopContainerResponse()

    def RemoveContainer(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.RemoveContainerResponse:
        self._enter("RemoveContainer", request, context)
        self.containers.pop(request.container_id, None)
        self.pod_of.pop(request.container_id, None)
        return cri_pb2.RemoveContainerResponse()

    def ListContainers(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.ListContainersResponse:
        self._enter("ListContainers", request, context)
        items = [
            cri_pb2.Container(
                id=item.id, pod_sandbox_id=self.pod_of[item.id], metadata=item.metadata, state=item.state,
                image=item.image, created_at=item.created_at,
            )
            for item in self.containers.values()
        ]  # fmt: skip
        return cri_pb2.ListContainersResponse(containers=items)

    def ContainerStatus(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.ContainerStatusResponse:
        self._enter("ContainerStatus", request, context)
        status = self.containers.get(request.container_id) or self._unknown(request.container_id, context)
        return cri_pb2.ContainerStatusResponse(status=status, info=self.info if request.verbose else None)

    def Exec(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.ExecResponse:
        self._enter("Exec", request, context)
        spec = ExecSpec(
            container_id=request.container_id,
            argv=list(request.cmd),
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return cri_pb2.ExecResponse(url=self.streams.url(spec))

    def Attach(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.AttachResponse:
        self._enter("Attach", request, context)
        spec = AttachSpec(
            container_id=request.container_id,
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return cri_pb2.AttachResponse(url=self.streams.url(spec))

    def PortForward(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.PortForwardResponse:
        self._enter("PortForward", request, context)
        return cri_pb2.PortForwardResponse(
            url=self.streams.url(PortForwardSpec(sandbox_id=request.pod_sandbox_id, ports=list(request.port)))
        )

    def ExecSync(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.ExecSyncResponse:
        self._enter("ExecSync", request, context)
        return self.exec_answer

    # --- ImageService

    def _find(self, name: str) -> cri_pb2.Image | None:
        for image in self.images.values():
            if name in (image.id, *image.repo_tags, *(tag.rsplit("/", 1)[-1] for tag in image.repo_tags)):
                return image
        return None

    def ListImages(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.ListImagesResponse:
        self._enter("ListImages", request, context)
        return cri_pb2.ListImagesResponse(images=self.images.values())

    def ImageStatus(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.ImageStatusResponse:
        self._enter("ImageStatus", request, context)
        return cri_pb2.ImageStatusResponse(image=self._find(request.image.image))

    def PullImage(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.PullImageResponse:
        self._enter("PullImage", request, context)
        return cri_pb2.PullImageResponse(image_ref=self.add_image(request.image.image, "f").id)

    def RemoveImage(self, request: Any, context: grpc.ServicerContext) -> cri_pb2.RemoveImageResponse:
        self._enter("RemoveImage", request, context)
        self.images.pop(request.image.image, None)
        return cri_pb2.RemoveImageResponse()

    # --- MachineMaintenance

    def ListPodKinds(self, request: Any, context: grpc.ServicerContext) -> maintenance_pb2.ListPodKindsResponse:
        self._enter("ListPodKinds", request, context)
        kinds = {pod.id: pod.annotations.get("vmruntime.io/kind", "container") for pod in self.pods.values()}
        pods = [maintenance_pb2.PodKind(pod_sandbox_id=pod, kind=kind) for pod, kind in kinds.items()]
        return maintenance_pb2.ListPodKindsResponse(pods=pods)

    def PauseMachine(self, request: Any, context: grpc.ServicerContext) -> maintenance_pb2.PauseMachineResponse:
        self._enter("PauseMachine", request, context)
        self.machines.append(("pause", request.pod_sandbox_id))
        return maintenance_pb2.PauseMachineResponse()

    def ResumeMachine(self, request: Any, context: grpc.ServicerContext) -> maintenance_pb2.ResumeMachineResponse:
        self._enter("ResumeMachine", request, context)
        self.machines.append(("resume", request.pod_sandbox_id))
        return maintenance_pb2.ResumeMachineResponse()

    def ResetMachine(self, request: Any, context: grpc.ServicerContext) -> maintenance_pb2.ResetMachineResponse:
        self._enter("ResetMachine", request, context)
        self.machines.append(("reset", request.pod_sandbox_id))
        return maintenance_pb2.ResetMachineResponse()

    # --- PodTraces

    def ListTracedPods(self, request: Any, context: grpc.ServicerContext) -> maintenance_pb2.ListTracedPodsResponse:
        self._enter("ListTracedPods", request, context)
        return maintenance_pb2.ListTracedPodsResponse(pods=self.traced)

    def GetPodTrace(self, request: Any, context: grpc.ServicerContext) -> maintenance_pb2.GetPodTraceResponse:
        self._enter("GetPodTrace", request, context)
        return maintenance_pb2.GetPodTraceResponse(calls=self.traces.get(request.pod_sandbox_id, []))

    # --- ImageMaintenance

    def ListImageUse(self, request: Any, context: grpc.ServicerContext) -> maintenance_pb2.ListImageUseResponse:
        self._enter("ListImageUse", request, context)
        return maintenance_pb2.ListImageUseResponse(images=self.uses.values())

    def PruneImages(self, request: Any, context: grpc.ServicerContext) -> maintenance_pb2.PruneImagesResponse:
        self._enter("PruneImages", request, context)
        images = [
            maintenance_pb2.PrunedImage(
                id=use.id, repo_tags=self.images[use.id].repo_tags, last_used_at=use.last_used_at
            )
            for use in self.uses.values()
            if not use.in_use
        ]
        return maintenance_pb2.PruneImagesResponse(images=images, freed_bytes=len(images) * 2**20)

    @staticmethod
    def _unknown(identifier: str, context: grpc.ServicerContext) -> NoReturn:
        context.abort(grpc.StatusCode.NOT_FOUND, f"no such id: {identifier}")
        raise AssertionError


class FakeDaemon:
    """FakeCri on a socket."""

    def __init__(self, socket: Path) -> None:
        # Calls no test makes stay those of the base class, which answer UNIMPLEMENTED.
        self.cri = FakeCri()  # type: ignore[abstract]
        self.socket = socket
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=8))
        cri_pb2_grpc.add_RuntimeServiceServicer_to_server(self.cri, self._server)
        cri_pb2_grpc.add_ImageServiceServicer_to_server(self.cri, self._server)
        maintenance_pb2_grpc.add_ImageMaintenanceServicer_to_server(self.cri, self._server)
        maintenance_pb2_grpc.add_MachineMaintenanceServicer_to_server(self.cri, self._server)
        maintenance_pb2_grpc.add_PodTracesServicer_to_server(self.cri, self._server)
        self._server.add_insecure_port(f"unix://{socket}")
        self._server.start()

    def close(self) -> None:
        self.cri.close()
        self._server.stop(None).wait()
