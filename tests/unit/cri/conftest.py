from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.unit.cri.fakes import (
    FakeClock,
    FakeConditions,
    FakeImages,
    FakeMachines,
    FakeNodeNetwork,
    FakePods,
    FakeStreams,
)
from vmruntime.config.settings import Settings
from vmruntime.cri.server import CriServer
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import cri_pb2_grpc, maintenance_pb2_grpc
from vmruntime.model.sandbox import SandboxKind


@dataclasses.dataclass
class Rig:
    """A server on a real socket with fakes behind it, and a client of both services."""

    socket: Path
    server: CriServer
    pods: FakePods
    images: FakeImages
    conditions: FakeConditions
    streams: FakeStreams
    node_network: FakeNodeNetwork
    runtime: Any
    image: Any
    maintenance: Any
    machines: FakeMachines
    machine_maintenance: Any

    async def sandbox(self, name: str = "web", labels: dict[str, str] | None = None, **config: Any) -> str:
        request = cri.RunPodSandboxRequest(config=sandbox_config(name, labels=labels or {}, **config))
        return str((await self.runtime.RunPodSandbox(request)).pod_sandbox_id)

    async def container(self, sandbox_id: str, name: str = "main", **config: Any) -> str:
        request = cri.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=container_config(name, **config))
        return str((await self.runtime.CreateContainer(request)).container_id)


def sandbox_config(name: str = "web", **config: Any) -> cri.PodSandboxConfig:
    metadata = cri.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default", attempt=1)
    return cri.PodSandboxConfig(
        **{"metadata": metadata, "hostname": name, "log_directory": f"/var/log/pods/{name}", **config}
    )


def container_config(name: str = "main", **config: Any) -> cri.ContainerConfig:
    return cri.ContainerConfig(
        **{
            "metadata": cri.ContainerMetadata(name=name, attempt=2),
            "image": cri.ImageSpec(image="sha256:abc", user_specified_image="busybox:1"),
            "log_path": f"{name}/0.log",
            **config,
        }
    )


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    # pytest's own directories make a socket's path too long.
    with tempfile.TemporaryDirectory(prefix="cri") as directory:
        yield Path(directory)


def make_server(socket: Path, clock: FakeClock | None = None, **parts: Any) -> CriServer:
    clock = clock or FakeClock()
    return CriServer(
        **{
            "pods": FakePods(clock),
            "images": FakeImages(),
            "machines": FakeMachines(),
            "conditions": FakeConditions(),
            "streams": FakeStreams(),
            "node_network": FakeNodeNetwork(),
            "settings": Settings(),
            "kinds": frozenset({SandboxKind.CONTAINER}),
            "socket": socket,
            "clock": clock,
            **parts,
        }
    )


@pytest.fixture
async def rig(socket_dir: Path) -> AsyncIterator[Rig]:
    clock, socket = FakeClock(), socket_dir / "cri.sock"
    pods, images, conditions, streams = FakePods(clock), FakeImages(), FakeConditions(), FakeStreams()
    node_network, machines = FakeNodeNetwork(), FakeMachines()
    server = make_server(
        socket,
        clock,
        pods=pods,
        images=images,
        machines=machines,
        conditions=conditions,
        streams=streams,
        node_network=node_network,
    )
    await server.start()
    options = [("grpc.max_receive_message_length", 16 * 1024 * 1024)]
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel:
        yield Rig(
            socket=socket,
            server=server,
            pods=pods,
            images=images,
            conditions=conditions,
            streams=streams,
            node_network=node_network,
            runtime=cri_pb2_grpc.RuntimeServiceStub(channel),
            image=cri_pb2_grpc.ImageServiceStub(channel),
            maintenance=maintenance_pb2_grpc.ImageMaintenanceStub(channel),
            machines=machines,
            machine_maintenance=maintenance_pb2_grpc.MachineMaintenanceStub(channel),
        )
    await server.stop(grace=0.1)
