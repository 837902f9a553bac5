"""A daemon in this process, with guests and network in memory, and what tests do with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from tests.support.fakes import make_image
from vmruntime.config.settings import Settings
from vmruntime.daemon.main import serve
from vmruntime.daemon.parts import Parts
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import cri_pb2_grpc
from vmruntime.model.image import Image
from vmruntime.paths import Paths
from vmruntime.store.database import Database
from vmruntime.store.image_records import ImageRecords

PATIENCE = 30.0


async def put_image(settings: Settings) -> Image:
    """Write an image into the store, as if it had been pulled."""
    paths = Paths(root=Path(settings.root), run=Path(settings.run))
    image = make_image("busybox", "a", entrypoint=["/bin/sh"])
    paths.layers.mkdir(parents=True)
    database = await Database.open(paths.database)
    for layer in image.layers:
        (paths.layers / f"{layer.diff_id.removeprefix('sha256:')}.erofs").write_bytes(b"\0" * layer.size)
        await ImageRecords(database).put_layer(layer)
    await ImageRecords(database).put_images([image])
    await database.close()
    return image


@contextlib.asynccontextmanager
async def serving(settings: Settings, parts: Parts) -> AsyncIterator[Any]:
    """Run a daemon and yield a stub of its runtime service; SIGTERM ends it."""
    daemon = asyncio.ensure_future(serve(settings, parts))
    options = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.min_reconnect_backoff_ms", 20)]
    channel = grpc.aio.insecure_channel(f"unix:{settings.run}/vmruntime.sock", options=options)
    stub = cri_pb2_grpc.RuntimeServiceStub(channel)
    version = asyncio.ensure_future(stub.Version(cri.VersionRequest(), wait_for_ready=True, timeout=PATIENCE))
    try:
        await asyncio.wait({daemon, version}, return_when=asyncio.FIRST_COMPLETED)
        if daemon.done():
            daemon.result()
        await version
        yield stub
    finally:
        version.cancel()
        await channel.close()
        if not daemon.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await daemon


def pod_config(settings: Settings, name: str) -> Any:
    return cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=name, uid="u", namespace="n"),
        log_directory=f"{settings.root}/logs",
        linux=cri.LinuxPodSandboxConfig(),
    )


async def start(stub: Any, settings: Settings, image: Image, script: str) -> tuple[str, str]:
    config = pod_config(settings, "web")
    pod = (await stub.RunPodSandbox(cri.RunPodSandboxRequest(config=config))).pod_sandbox_id
    container = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="app"),
        image=cri.ImageSpec(image=image.id),
        command=["/bin/sh", "-c", script],
        log_path="app.log",
        linux=cri.LinuxContainerConfig(),
    )
    request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
    created = (await stub.CreateContainer(request)).container_id
    await stub.StartContainer(cri.StartContainerRequest(container_id=created))
    return pod, created


async def exited(stub: Any, container: str) -> Any:
    async with asyncio.timeout(PATIENCE):
        while True:
            status = (await stub.ContainerStatus(cri.ContainerStatusRequest(container_id=container))).status
            if status.state == cri.CONTAINER_EXITED:
                return status
            await asyncio.sleep(0.01)
