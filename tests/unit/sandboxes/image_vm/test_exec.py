"""Commands in a machine whose guest agent is a fake at the other end of the chardev's socket."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.qga.fake_agent import FakeAgent
from vmruntime.agent.errors import AgentError, AgentGone, AgentLied
from vmruntime.agent.interface import ExecOutput
from vmruntime.errors import Code
from vmruntime.model.streams import ExecEnd, ExecSpec, OutputChunk, TerminalSize
from vmruntime.qga.client import INPUT_LIMIT
from vmruntime.sandboxes.image_vm import guest_link
from vmruntime.sandboxes.image_vm.exec import CHUNK, GuestCommands, GuestExec
from vmruntime.sandboxes.image_vm.guest_link import GuestLink


class Machine:
    """A machine's guest agent: each program runs until the test ends it, and says what it was told.

    Attributes:
        agents: One for each connection.
        started: Arguments of guest-exec.
        running: Whether programs go on.
        end: How they end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self.agents: list[FakeAgent] = []
        self.deaf = False
        self.started: list[dict[str, Any]] = []
        self.running: set[int] = set()
        self.long: set[str] = set()
        self.end: dict[str, Any] = {"exitcode": 0}
        self.answers: dict[str, Any] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for agent in self.agents:
            agent.writer.close()
        await self._server.wait_closed()
        self._path.unlink(missing_ok=True)

    async def until_started(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.started) < count:
                await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        agent = FakeAgent(reader, writer)
        agent.answers |= {"guest-exec": self._exec, "guest-exec-status": self._status} | self.answers
        if self.deaf:
            agent.listening.clear()
        self.agents.append(agent)
        await agent.serve()
        writer.close()

    def _exec(self, arguments: dict[str, Any]) -> Any:
        self.started.append(arguments)
        pid = 1000 + len(self.started)
        if arguments["path"] == "kill":
            self.running.discard(int(arguments["arg"][1]))
        elif arguments["path"] in self.long:
            self.running.add(pid)
        return {"pid": pid}

    def _status(self, arguments: dict[str, Any]) -> Any:
        return {"exited": False} if arguments["pid"] in self.running else {"exited": True, **self.end}


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    found = Machine(tmp_path / "qga.sock")
    await found.start()
    yield found
    await found.stop()


@pytest.fixture
async def commands(tmp_path: Path, machine: Machine) -> AsyncIterator[GuestCommands]:
    link = GuestLink(tmp_path)
    yield GuestCommands(link)
    await link.close()


def spec(*argv: str, stdin: bool = False, tty: bool = False, timeout: float = 0, stderr: bool = True) -> ExecSpec:
    return ExecSpec(container_id="c", argv=list(argv), stdin=stdin, tty=tty, timeout=timeout, stderr=stderr)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def output(stream: GuestExec) -> list[OutputChunk]:
    async with asyncio.timeout(10):
        return [chunk async for chunk in stream.output()]


async def test_exec_sync(machine: Machine, commands: GuestCommands) -> None:
    machine.end = {"exitcode": 3, "out-data": b64(b"out"), "err-data": b64(b"err")}
    found = await commands.exec_sync(["cat", "/x"], 0, 2)
    assert found == ExecOutput(stdout=b"ou", stderr=b"er", end=ExecEnd(exit_code=3))
    assert machine.started[0]["path"] == "cat"
    machine.end = {"signal": 15}
    assert (await commands.exec_sync(["x"], 5, 100)).end == ExecEnd(exit_code=143)
    assert len(machine.agents) == 1


async def test_what_takes_too_long_is_killed(machine: Machine, commands: GuestCommands) -> None:
    machine.long = {"sleep"}
    found = await commands.exec_sync(["sleep"], 0.1, 100)
    assert found.end == ExecEnd(exit_code=137, timed_out=True)
    assert not machine.running


async def test_what_cannot_be_run(machine: Machine, commands: GuestCommands) -> None:
    machine.answers["guest-exec"] = RuntimeError("Failed to execute child process “nix” (No such file or directory)")
    found = await commands.exec_sync(["nix"], 0, 100)
    assert found.end == ExecEnd(exit_code=127, error='exec: "nix": executable file not found in $PATH')
    machine.agents[0].answers["guest-exec"] = RuntimeError("Failed to execute child process “/etc” (Permission denied)")
    async with commands.exec(spec("/etc")) as stream:
        assert await output(stream) == [OutputChunk(False, b"")]
    assert stream.end.exit_code == 126
    assert stream.end.error.startswith('exec: "/etc": ')
    assert "Permission denied" in stream.end.error


async def test_a_stream_gives_the_output_in_chunks(machine: Machine, commands: GuestCommands) -> None:
    text = bytes(range(256)) * 512
    machine.end = {"exitcode": 0, "out-data": b64(text), "err-data": b64(b"err")}
    async with commands.exec(spec("cat")) as stream:
        await stream.resize(TerminalSize(columns=1, rows=1))
        await stream.write(b"nobody asked for this")
        chunks = await output(stream)
        assert chunks[0] == OutputChunk(False, b"")
        assert max(len(chunk.data) for chunk in chunks) == CHUNK
        assert b"".join(chunk.data for chunk in chunks if not chunk.stderr) == text
        assert chunks[-1] == OutputChunk(True, b"err")
    assert stream.end == ExecEnd(exit_code=0)
    assert "input-data" not in machine.started[0]
    async with commands.exec(spec("cat", stderr=False)) as stream:
        assert not any(chunk.stderr for chunk in await output(stream))


async def test_input_is_collected_to_its_end(machine: Machine, commands: GuestCommands) -> None:
    async with commands.exec(spec("cat", stdin=True)) as stream:
        await stream.write(b"one ")
        await asyncio.sleep(0.05)
        await stream.write(b"two")
        assert machine.started == []
        await stream.close_input()
        await output(stream)
    assert machine.started[0]["input-data"] == b64(b"one two")


async def test_too_much_input(machine: Machine, commands: GuestCommands) -> None:
    async with commands.exec(spec("cat", stdin=True)) as stream:
        for _ in range(INPUT_LIMIT // 65536 + 10):
            await stream.write(b"x" * 65536)
        with pytest.raises(AgentError, match="can be passed through the QEMU guest agent") as caught:
            await output(stream)
        assert caught.value.code is Code.INVALID_ARGUMENT
    assert machine.started == []


async def test_leaving_kills(machine: Machine, commands: GuestCommands) -> None:
    machine.long = {"sleep"}
    async with commands.exec(spec("sleep")):
        await machine.until_started(1)
        assert machine.running
    assert not machine.running
    async with commands.exec(spec("cat", stdin=True)) as waiting:
        await waiting.write(b"x")
    with pytest.raises(AgentError, match="not read to its end"):
        _ = waiting.end


async def test_a_time_out_of_a_stream(machine: Machine, commands: GuestCommands) -> None:
    machine.long = {"sleep"}
    async with commands.exec(spec("sleep", timeout=0.1)) as stream:
        await output(stream)
    assert stream.end == ExecEnd(exit_code=137, timed_out=True)


async def test_a_long_command_holds_up_nobody(machine: Machine, commands: GuestCommands) -> None:
    machine.long = {"sleep"}
    async with commands.exec(spec("sleep")):
        await machine.until_started(1)
        async with asyncio.timeout(2):
            for _ in range(10):
                assert (await commands.exec_sync(["true"], 1, 100)).end.exit_code == 0


async def test_no_terminal(commands: GuestCommands) -> None:
    with pytest.raises(AgentError, match="has no terminals .*vmruntime ssh POD") as caught:
        async with commands.exec(spec("sh", tty=True)):
            pass
    assert caught.value.code is Code.UNIMPLEMENTED


async def test_a_guest_without_an_agent(
    machine: Machine, commands: GuestCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_link, "ANSWER_SECONDS", 0.1)
    machine.deaf = True
    with pytest.raises(AgentError, match="may still be starting, or has none .*apt install") as caught:
        await commands.exec_sync(["true"], 1, 100)
    assert caught.value.code is Code.UNAVAILABLE
    async with commands.exec(spec("true")) as stream:
        with pytest.raises(AgentError, match="may still be starting"):
            await output(stream)
    assert len(machine.agents) == 1
    machine.agents[0].listening.set()
    assert (await commands.exec_sync(["true"], 1, 100)).end.exit_code == 0


async def test_an_agent_that_may_not(machine: Machine, commands: GuestCommands) -> None:
    machine.answers["guest-info"] = {"version": "9", "supported_commands": [{"name": "guest-ping"}]}
    with pytest.raises(AgentError, match="/etc/sysconfig/qemu-ga"):
        await commands.exec_sync(["true"], 1, 100)


async def test_an_agent_that_lies(machine: Machine, commands: GuestCommands) -> None:
    machine.answers["guest-exec"] = {"pid": -1}
    with pytest.raises(AgentLied):
        await commands.exec_sync(["true"], 1, 100)
    with pytest.raises(AgentError, match="names no program|no program to run"):
        await commands.exec_sync([], 1, 100)


async def test_the_machine_ends_and_starts_again(machine: Machine, commands: GuestCommands) -> None:
    await commands.exec_sync(["true"], 1, 100)
    machine.long = {"sleep"}
    async with commands.exec(spec("sleep")) as stream:
        await machine.until_started(2)
        await machine.stop()
        with pytest.raises(AgentGone):
            await output(stream)
    with pytest.raises(AgentGone, match="does not run"):
        await commands.exec_sync(["true"], 1, 100)
    await machine.start()
    assert (await commands.exec_sync(["true"], 1, 100)).end.exit_code == 0
    # Its end shows only when the next command is tried.
    await machine.stop()
    await machine.start()
    assert (await commands.exec_sync(["true"], 1, 100)).end.exit_code == 0
