"""Whatever a client sends, it gets an answer or a status that means something; never INTERNAL or UNKNOWN."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.cri.conftest import make_server
from tests.unit.cri.fakes import FakeClock, FakeImages, FakePods, make_image
from vmruntime.errors import Code
from vmruntime.generated import cri_pb2 as cri

METHODS = [method for service in cri.DESCRIPTOR.services_by_name.values() for method in service.methods]
MEANINGFUL = {code.name for code in Code} - {"INTERNAL", "CANCELLED"}
# A sandbox and a container that exist, so that calls get past the look-up.
SANDBOX_ID, CONTAINER_ID = "0001" + "a" * 60, "0002" + "a" * 60

texts = st.one_of(
    st.sampled_from(
        ["", "a", "/", "/a/b", "..", "../x", "a\0b", "\n", "x" * 3000, "ALL", "SYS_ADMIN", "0-3", "10.0.0.1"]
    ),
    st.sampled_from(["container", "image", "runtime/default", SANDBOX_ID, CONTAINER_ID, "0001", "2MB"]),
    st.text(max_size=8),
)
numbers = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.one_of(st.integers(-2, 2), st.integers(-(2**63), 2**63 - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.one_of(st.integers(0, 4), st.integers(-(2**31), 2**31 - 1)),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor) -> Message:
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        # Required parts are filled in more often than not, or nothing but "is required" would ever be seen.
        if draw(st.integers(0, 3)) > 0:
            _fill(draw, message, field)
    return message


def _fill(draw: st.DrawFn, message: Any, field: FieldDescriptor) -> None:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        for key, value in draw(st.dictionaries(texts, texts, max_size=2)).items():
            getattr(message, field.name)[key] = value
        return
    if field.is_repeated:
        target = getattr(message, field.name)
        for _ in range(draw(st.integers(0, 2))):
            if kind is not None:
                target.append(draw(messages(kind)))
            else:
                target.append(draw(_scalar(field)))
    elif kind is not None:
        getattr(message, field.name).CopyFrom(draw(messages(kind)))
    else:
        setattr(message, field.name, draw(_scalar(field)))


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=8)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return texts
    return numbers[field.cpp_type]


class Client:
    """A server and a client in an event loop of their own, since hypothesis calls functions that are not async."""

    def __init__(self, runner: asyncio.Runner, directory: Path) -> None:
        self._runner = runner
        runner.run(self._open(directory / "cri.sock"))

    async def _open(self, socket: Path) -> None:
        clock = FakeClock()
        self._pods, self._images = FakePods(clock), FakeImages()
        self._server = make_server(socket, clock, pods=self._pods, images=self._images)
        await self._server.start()
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}")

    async def _refill(self) -> None:
        from tests.unit.cri.conftest import container_config, sandbox_config
        from vmruntime.cri.translate.container import container_from_cri
        from vmruntime.cri.translate.sandbox import sandbox_from_cri
        from vmruntime.model.sandbox import SandboxKind

        self._pods.__init__(FakeClock())  # type: ignore[misc]
        kinds = frozenset({SandboxKind.CONTAINER})
        sandbox_request = cri.RunPodSandboxRequest(config=sandbox_config("known"))
        spec = sandbox_from_cri(sandbox_request, default_kind=SandboxKind.CONTAINER, supported=kinds)
        assert await self._pods.run_sandbox(spec) == SANDBOX_ID
        request = cri.CreateContainerRequest(pod_sandbox_id=SANDBOX_ID, config=container_config())
        container = container_from_cri(request, spec, supported=kinds)
        assert await self._pods.create_container(SANDBOX_ID, container) == CONTAINER_ID
        self._images.found = [make_image()]

    def call(self, method: Any, request: Message) -> str:
        return self._runner.run(self._call(method, request))

    async def _call(self, method: Any, request: Message) -> str:
        await self._refill()
        path = f"/{method.containing_service.full_name}/{method.name}"
        answer = GetMessageClass(method.output_type)
        try:
            if method.server_streaming:
                stream = self._channel.unary_stream(path, response_deserializer=answer.FromString)
                async for _ in stream(request.SerializeToString()):
                    pass
            else:
                unary = self._channel.unary_unary(path, response_deserializer=answer.FromString)
                await unary(request.SerializeToString())
        except grpc.aio.AioRpcError as error:
            assert error.details()
            return error.code().name
        return "OK"

    async def close(self) -> None:
        await self._channel.close()
        await self._server.stop(grace=0)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with tempfile.TemporaryDirectory(prefix="cri") as directory, asyncio.Runner() as runner:
        client = Client(runner, Path(directory))
        yield client
        runner.run(client.close())


@pytest.mark.parametrize("method", [m for m in METHODS if m.name != "GetContainerEvents"], ids=lambda m: m.name)
def test_any_request_gets_a_meaningful_answer(client: Client, method: Any) -> None:
    wide = method.name in ("RunPodSandbox", "CreateContainer")

    @settings(
        max_examples=150 if wide else 15,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(request=messages(method.input_type))
    def run(request: Message) -> None:
        assert client.call(method, request) in MEANINGFUL | {"OK"}

    run()
