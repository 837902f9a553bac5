"""Whatever a client sends, it gets an answer or a status that means something; never INTERNAL or UNKNOWN.

Twice: with pods that are fakes, and with the real use cases over sandboxes in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.messages import damaged, messages
from tests.unit.cri.conftest import container_config, make_server, sandbox_config
from tests.unit.cri.fakes import FakeClock, FakeImages, FakePods, make_image
from tests.unit.pods.bed import TRAP, Daemon, World, until_ready
from vmruntime.cri.server import CriServer
from vmruntime.cri.translate.container import container_from_cri
from vmruntime.cri.translate.sandbox import sandbox_from_cri
from vmruntime.errors import Code
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import maintenance_pb2
from vmruntime.model.container import ContainerState
from vmruntime.model.sandbox import SandboxKind
from vmruntime.pods import container_create
from vmruntime.pods.log_pump import LogPump

METHODS = [
    method
    for descriptor in (cri.DESCRIPTOR, maintenance_pb2.DESCRIPTOR)
    for service in descriptor.services_by_name.values()
    for method in service.methods
]
EVENTS = "GetContainerEvents"
MEANINGFUL = {code.name for code in Code} - {"INTERNAL", "CANCELLED"}
KINDS = frozenset({SandboxKind.CONTAINER})
PATIENCE = 30.0
MORE_TASKS = 4
A_MOMENT = 0.02

# Sandboxes and containers that exist, so that calls get past the look-up: those of the fakes, and the real ones.
IDS = ["0001" + "a" * 60, "0002" + "a" * 60, World.id_number(1), World.id_number(2)]

texts = st.one_of(
    st.sampled_from(
        ["", "a", "/", "/a/b", "..", "../x", "a\0b", "\n", "x" * 3000, "ALL", "SYS_ADMIN", "0-3", "10.0.0.1"]
    ),
    st.sampled_from(["container", "image", "runtime/default", "0001", "2MB", "true", "echo", "busybox", *IDS, *IDS]),
    st.text(max_size=8),
)
octets = st.binary(max_size=8)
SETTINGS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


class Client:
    """A server and a client in an event loop of their own, since hypothesis calls functions that are not async."""

    def __init__(self, runner: asyncio.Runner, directory: Path) -> None:
        self._runner = runner
        self.images = FakeImages()
        runner.run(self._open(directory))

    async def _open(self, directory: Path) -> None:
        self._server = await self.serve(directory)
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"unix:{directory / 'cri.sock'}")

    async def serve(self, directory: Path) -> CriServer:
        """Return the server."""
        clock = FakeClock()
        self._pods = FakePods(clock)
        return make_server(directory / "cri.sock", clock, pods=self._pods, images=self.images)

    async def refill(self) -> None:
        """Make the sandbox and the container that are known."""
        self._pods.__init__(FakeClock())  # type: ignore[misc]
        sandbox_request = cri.RunPodSandboxRequest(config=sandbox_config("known"))
        spec = sandbox_from_cri(sandbox_request, default_kind=SandboxKind.CONTAINER, supported=KINDS)
        assert await self._pods.run_sandbox(spec) == IDS[0]
        request = cri.CreateContainerRequest(pod_sandbox_id=IDS[0], config=container_config())
        container = container_from_cri(request, spec, supported=KINDS)
        assert await self._pods.create_container(IDS[0], container) == IDS[1]

    def call(self, method: Any, request: bytes) -> str:
        """Return the name of the status."""
        return self._runner.run(self._call(method, request))

    async def _call(self, method: Any, request: bytes) -> str:
        await self.refill()
        self.images.found = [make_image()]
        path = f"/{method.containing_service.full_name}/{method.name}"
        answer = GetMessageClass(method.output_type)
        try:
            async with asyncio.timeout(PATIENCE):
                if method.server_streaming:
                    stream = self._channel.unary_stream(path, response_deserializer=answer.FromString)(request)
                    await self._read(stream, endless=method.name == EVENTS)
                else:
                    unary = self._channel.unary_unary(path, response_deserializer=answer.FromString)
                    await unary(request)
        except grpc.aio.AioRpcError as error:
            assert error.details()
            return error.code().name
        return "OK"

    async def _read(self, stream: Any, *, endless: bool) -> None:
        try:
            async with asyncio.timeout(A_MOMENT if endless else None):
                async for _ in stream:
                    pass
        except TimeoutError:
            stream.cancel()  # it ends with its client

    def tasks(self, most: float = math.inf) -> int:
        """Return how many tasks there are, once there are no more than so many or they do not end."""
        return self._runner.run(self._tasks(most))

    async def _tasks(self, most: float) -> int:
        await self.refill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while len(asyncio.all_tasks()) > most:
                    await asyncio.sleep(A_MOMENT)
        return len(asyncio.all_tasks())

    async def close(self) -> None:
        await self._channel.close()
        await self._server.stop(grace=0)


class PodClient(Client):
    """A server over the use cases of pods."""

    async def serve(self, directory: Path) -> CriServer:
        self._daemon = await Daemon.start(World(directory / "world"))
        return make_server(directory / "cri.sock", pods=self._daemon.pods, images=self.images)

    async def refill(self) -> None:
        pods = self._daemon.pods
        found = {one.id: one.state for one in pods.containers()}
        for sandbox in pods.sandboxes():
            if sandbox.id != IDS[2] or found.get(IDS[3]) is not ContainerState.RUNNING:
                await pods.remove_sandbox(sandbox.id)
        for container in pods.containers():
            if container.id != IDS[3]:
                await pods.remove_container(container.id)
        if not pods.sandboxes():
            self._daemon.world.ids = 0
            assert await self._daemon.run_pod() == IDS[2]
            # It ends when it is told to: some of the stops are very patient.
            assert await self._daemon.run(IDS[2], "sh", "-c", TRAP) == IDS[3]
            await until_ready(self._daemon)

    async def close(self) -> None:
        await super().close()
        for sandbox in self._daemon.pods.sandboxes():
            await self._daemon.pods.remove_sandbox(sandbox.id)
        await self._daemon.nothing_left()
        await self._daemon.stop()


class HereOnly(LogPump):
    """Writes logs where tests may write, and not wherever a client likes."""

    directory = Path()

    def __init__(self, agent: Any, container_id: str, log_path: str, position: Path) -> None:
        here = str(self.directory / f"{container_id[:13]}.log")
        super().__init__(agent, container_id, log_path if Path(log_path).name == "app.log" else here, position)


@pytest.fixture(scope="module", params=[Client, PodClient], ids=["fakes", "pods"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    with (
        tempfile.TemporaryDirectory(prefix="cri") as directory,
        asyncio.Runner() as runner,
        pytest.MonkeyPatch.context() as patch,
    ):
        HereOnly.directory = Path(directory)
        patch.setattr(container_create, "LogPump", HereOnly)
        client: Client = request.param(runner, Path(directory))
        yield client
        runner.run(client.close())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_any_request_gets_a_meaningful_answer(client: Client, method: Any) -> None:
    wide = method.name in ("RunPodSandbox", "CreateContainer", "UpdateContainerResources", "UpdatePodSandboxResources")
    whole = messages(method.input_type, texts, octets).map(lambda one: one.SerializeToString())
    before = client.tasks()

    @settings(SETTINGS, max_examples=examples(40 if wide else 8))
    @given(request=st.one_of(whole, whole, whole, damaged(whole)))
    def run(request: bytes) -> None:
        assert client.call(method, request) in MEANINGFUL | {"OK"}

    run()
    assert client.tasks(before + MORE_TASKS) <= before + MORE_TASKS


def test_a_method_that_is_none(client: Client) -> None:
    class Unknown:
        name = "NoSuchMethod"
        server_streaming = False
        containing_service = METHODS[0].containing_service
        output_type = METHODS[0].output_type

    assert client.call(Unknown, b"") == "UNIMPLEMENTED"
