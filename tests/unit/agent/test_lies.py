"""A guest that lies: whatever arrives in place of an answer, the client returns what can be trusted or says why not."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.messages import damaged, messages
from vmruntime.agent.checks import TEXT_LIMIT
from vmruntime.agent.client import AgentClient
from vmruntime.agent.errors import AgentError, AgentLied
from vmruntime.agent.interface import GuestContainer, GuestSetup, PidMode, ProcessStream
from vmruntime.errors import Code
from vmruntime.generated import agent_pb2
from vmruntime.model.sandbox import Dns
from vmruntime.model.streams import AttachSpec, ExecSpec

SERVICE = agent_pb2.DESCRIPTOR.services_by_name["Agent"]
METHODS = list(SERVICE.methods)
PATIENCE = 20.0
MESSAGE_LIMIT = TEXT_LIMIT + 200
"""Characters of an error's message: the agent's words and ours."""

READ_LIMIT = 200
"""Messages that are read of a stream; some never end."""

SETTINGS = settings(
    max_examples=examples(30),
    phases=[Phase.explicit, Phase.generate],  # making an example smaller can take for ever with streams that never end
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

texts = st.one_of(
    st.sampled_from(["", "x" * 5000, "\x1b[2J\x1b[31m", "a\nlevel=error forged", "\0", "‮txt", "../../etc", "c" * 64]),
    st.text(max_size=8),
)
octets = st.one_of(st.sampled_from([b"", b"a\nb", b"\x1b[2J", b"x" * 20_000]), st.binary(max_size=16))


class Answer(msgspec.Struct):
    """What a call gets.

    Attributes:
        messages: As they are on the wire; of a unary call, the first one.
        code: The status at the end.
        details: Its words.
        endless: Whether the last message comes again and again.
    """

    messages: list[bytes] = []
    code: int = 0
    details: str = ""
    endless: bool = False


class LyingAgent:
    """A server that answers every call with what it is told, and a client of it."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.calls = 0

    async def open(self, directory: Path) -> None:
        handlers: dict[str, Any] = {}
        for method in SERVICE.methods:
            kind = (
                f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
            )
            serve = self._stream if method.server_streaming else self._unary
            handlers[method.name] = getattr(grpc, f"{kind}_rpc_method_handler")(serve)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)])
        self._server.add_insecure_port(f"unix:{directory / 'agent.sock'}")
        await self._server.start()
        self.client = AgentClient(directory / "agent.sock")

    async def close(self) -> None:
        await self.client.close()
        await self._server.stop(None)

    async def _unary(self, request: Any, context: Any) -> bytes:
        self.calls += 1
        if self.answer.code or not self.answer.messages:
            await context.abort(_status(self.answer.code or grpc.StatusCode.UNKNOWN.value[0]), self.answer.details)
        return self.answer.messages[0]

    async def _stream(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        self.calls += 1
        for message in self.answer.messages:
            yield message
        while self.answer.endless and self.answer.messages:
            yield self.answer.messages[-1]
        if self.answer.code:
            await context.abort(_status(self.answer.code), self.answer.details)


def _status(number: int) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == number)


async def read_some(items: AsyncIterator[Any]) -> list[Any]:
    found: list[Any] = []
    async with contextlib.aclosing(items) as iterator:  # type: ignore[type-var]
        async for item in iterator:
            found.append(item)
            if len(found) == READ_LIMIT:
                break
    return found


async def read_output(client: AgentClient) -> Any:
    async with client.output("c", 0) as reader:
        found = await read_some(aiter(reader))
        await reader.acknowledge(len(found))
        return found


async def use(process: ProcessStream) -> Any:
    await process.write(b"input")
    await process.close_input()
    return await read_some(process.output())


async def run_exec(client: AgentClient) -> Any:
    async with client.exec(ExecSpec(container_id="c", argv=["true"])) as command:
        found = await use(command)
        return [*found, command.end] if len(found) < READ_LIMIT else found


async def run_attach(client: AgentClient) -> Any:
    async with client.attach(AttachSpec(container_id="c")) as joined:
        return await use(joined)


async def run_port(client: AgentClient) -> Any:
    async with client.ports() as ports, ports.connect(80) as connection:
        await connection.write(b"input")
        await connection.close_write()
        return await read_some(connection.read())


SETUP = GuestSetup(
    sandbox_id="s",
    hostname="h",
    time_ns=1,
    entropy=b"",
    interfaces=[],
    routes=[],
    dns=Dns(),
    sysctls={},
    scratch_serial="",
    shared_pid_namespace=False,
)
CONTAINER = GuestContainer(
    id="c",
    oci_spec=b"{}",
    layer_serials=[],
    readonly_rootfs=False,
    user="",
    groups=[],
    image_groups=False,
    pid_mode=PidMode.CONTAINER,
)
CALLS: dict[str, Callable[[AgentClient], Awaitable[Any]]] = {
    "Hello": lambda client: client.hello(),
    "SetupSandbox": lambda client: client.setup(SETUP),
    "Prepare": lambda client: client.prepare(b"x" * 64, "scratch", b"{}"),
    "CreateContainer": lambda client: client.create(CONTAINER),
    "StartContainer": lambda client: client.start("c"),
    "SignalContainer": lambda client: client.signal("c", 15),
    "DeleteContainer": lambda client: client.delete("c"),
    "ListContainers": lambda client: client.containers(),
    "Events": lambda client: read_some(client.events()),
    "ReadOutput": read_output,
    "Exec": run_exec,
    "Attach": run_attach,
    "PortForward": run_port,
    "Stats": lambda client: client.stats([]),
    "UpdateContainer": lambda client: client.update("c", b"{}"),
    "OnlineCpus": lambda client: client.online_cpus(2),
    "Shutdown": lambda client: client.shutdown(0.1),
}


class Rig:
    """A lying agent in an event loop of its own: hypothesis calls functions that are not async."""

    def __init__(self, runner: asyncio.Runner, directory: Path) -> None:
        self._runner = runner
        self.agent = LyingAgent()
        runner.run(self.agent.open(directory))

    def ask(self, method: str, answer: Answer) -> Any:
        """Call a method; return its result, or the AgentError it raised."""

        async def call() -> Any:
            self.agent.answer = answer
            async with asyncio.timeout(PATIENCE):
                try:
                    return await CALLS[method](self.agent.client)
                except AgentError as error:
                    return error

        return self._runner.run(call())


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="lie") as directory, asyncio.Runner() as runner:
        rig = Rig(runner, Path(directory))
        yield rig
        runner.run(rig.agent.close())


def check(result: Any) -> None:
    """Check that nothing of a result can harm who shows it, counts with it or keeps it."""
    if isinstance(result, AgentError):
        assert result.message
        assert result.message.isprintable()
        assert len(result.message) <= MESSAGE_LIMIT
        assert isinstance(result.code, Code)
    elif isinstance(result, str):
        assert result.isprintable()
        assert len(result) <= TEXT_LIMIT
    elif isinstance(result, int | float):
        assert 0 <= result < 2**64
    elif isinstance(result, list | tuple):
        for item in result:
            check(item)
    elif isinstance(result, msgspec.Struct):
        for value in msgspec.structs.astuple(result):
            check(value)


def test_every_call_is_made_here() -> None:
    assert set(CALLS) == {method.name for method in SERVICE.methods}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_any_answer(rig: Rig, method: MethodDescriptor) -> None:
    message = messages(method.output_type, texts, octets).map(lambda one: one.SerializeToString())
    answers = st.builds(
        Answer,
        messages=st.lists(st.one_of(message, message, damaged(message)), max_size=4),
        code=st.one_of(st.just(0), st.integers(0, 16)),
        details=texts,
        endless=st.booleans() if method.server_streaming else st.just(False),
    )

    @SETTINGS
    @given(answer=answers)
    def run(answer: Answer) -> None:
        check(rig.ask(method.name, answer))

    run()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_is_no_message_is_a_lie(rig: Rig, method: MethodDescriptor) -> None:
    result = rig.ask(method.name, Answer(messages=[b"\xff\xff\xff"]))
    assert isinstance(result, AgentLied), repr(result)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_answer_beyond_all_bounds(rig: Rig, method: MethodDescriptor) -> None:
    field = b"\xfa\x3f" + b"\x80\x80\xc0\x02" + bytes(5 * 1024 * 1024)  # field 1023, which nobody knows
    result = rig.ask(method.name, Answer(messages=[field]))
    assert isinstance(result, AgentError), repr(result)


def test_a_status_that_is_none(rig: Rig) -> None:
    for code in range(1, 17):
        result = rig.ask("StartContainer", Answer(code=code, details="\x1b[2J" + "y" * 10_000))
        assert isinstance(result, AgentError)
        check(result)
        assert "\x1b" not in result.message
