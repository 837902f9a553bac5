"""What guests are asked, and what they say."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.qga.fake_agent import NOTHING, FakeAgent, connected
from vmruntime.errors import DeadlineExceeded, InvalidArgument
from vmruntime.qga import answers, client
from vmruntime.qga.answers import ExecResult, GuestAddress, GuestFilesystem, GuestInterface, Traffic
from vmruntime.qga.client import GuestAgent
from vmruntime.qga.errors import QgaError, QgaGone, QgaLied, QgaNotStarted, QgaSilent, QgaUnsupported

Pair = tuple[GuestAgent, FakeAgent]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with connected() as both:
        yield both


class Processes:
    """Programs in a fake guest: each runs for so many questions, then ends as told."""

    def __init__(self, fake: FakeAgent, **end: Any) -> None:
        self.questions = 3
        self.end = {"exitcode": 0, **end}
        self.started: list[dict[str, Any]] = []
        self.collected: list[int] = []
        fake.answers["guest-exec"] = self._exec
        fake.answers["guest-exec-status"] = self._status

    def _exec(self, arguments: dict[str, Any]) -> dict[str, int]:
        self.started.append(arguments)
        if arguments["path"] == "kill":
            self.questions = 0
        return {"pid": 1000 + len(self.started)}

    def _status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.questions > 0:
            self.questions -= 1
            return {"exited": False}
        self.collected.append(arguments["pid"])
        return {"exited": True, **self.end}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def test_a_program(pair: Pair) -> None:
    agent, fake = pair
    processes = Processes(fake, exitcode=3, **{"out-data": b64(b"out\xff"), "err-data": b64(b"err")})
    found = await agent.run(["cat", "-n", "-"], timeout=10, env={"A": "1", "B": ""}, stdin=b"\0input")
    assert found == ExecResult(exit_code=3, stdout=b"out\xff", stderr=b"err")
    assert processes.started == [
        {"path": "cat", "arg": ["-n", "-"], "env": ["A=1", "B="], "input-data": b64(b"\0input"), "capture-output": True}
    ]
    await agent.run(["true"], timeout=10)
    assert processes.started[1] == {"path": "true", "arg": [], "capture-output": True}
    assert [command for command, _ in fake.calls].count("guest-info") == 1


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"exitcode": 255}, 255),
        ({"signal": 9}, 137),
        ({"exitcode": None, "signal": 15}, 143),
        ({"exitcode": 0xC0000005}, 5),
    ],
)
async def test_how_programs_end(pair: Pair, end: dict[str, Any], code: int) -> None:
    agent, fake = pair
    Processes(fake, **end)
    assert (await agent.run(["x"], timeout=10)).exit_code == code


async def test_output_that_is_cut(pair: Pair) -> None:
    agent, fake = pair
    processes = Processes(fake, **{"out-data": b64(b"x" * 100), "err-data": b64(b"y" * 10)})
    found = await agent.run(["x"], timeout=10, output_limit=20)
    assert found == ExecResult(exit_code=0, stdout=b"x" * 20, stderr=b"y" * 10, truncated=True)
    processes.end = {"exitcode": 0, "err-truncated": True}
    assert (await agent.run(["x"], timeout=10)).truncated


async def test_as_much_output_as_there_can_be(pair: Pair) -> None:
    agent, fake = pair
    most = b"x" * answers.OUTPUT_LIMIT
    Processes(fake, **{"out-data": b64(most), "err-data": b64(most), "out-truncated": True})
    found = await agent.run(["x"], timeout=60)
    assert (len(found.stdout), len(found.stderr), found.truncated) == (len(most), len(most), True)


async def test_more_output_than_there_can_be(pair: Pair) -> None:
    agent, fake = pair
    Processes(fake, **{"out-data": "x" * (3 * answers.OUTPUT_LIMIT)})
    with pytest.raises(QgaLied, match="an answer is longer than"):
        await agent.run(["x"], timeout=60)


async def test_a_program_that_takes_too_long(pair: Pair) -> None:
    agent, fake = pair
    processes = Processes(fake)
    processes.questions = 10**9
    with pytest.raises(DeadlineExceeded, match=r"^sleep did not finish within 0\.1 s in the guest"):
        await agent.run(["sleep", "60"], timeout=0.1)
    assert processes.started[1] == {"path": "kill", "arg": ["-KILL", "1001"]}
    assert processes.collected == [1002, 1001]


async def test_a_caller_who_goes_away(pair: Pair) -> None:
    agent, fake = pair
    processes = Processes(fake)
    processes.questions = 10**9
    running = asyncio.ensure_future(agent.run(["sleep", "60"], timeout=60))
    while not processes.started:
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert processes.collected == [1002, 1001]


async def test_a_caller_who_goes_away_before_it_is_known_what_has_started(pair: Pair) -> None:
    agent, fake = pair
    processes = Processes(fake)
    processes.questions = 10**9
    exec_ = fake.answers["guest-exec"]

    async def slowly(arguments: dict[str, Any]) -> Any:
        await asyncio.sleep(0.1)
        return exec_(arguments)

    fake.answers["guest-exec"] = slowly
    running = asyncio.ensure_future(agent.run(["sleep", "60"], timeout=None))
    while not fake.calls or fake.calls[-1][0] != "guest-exec":
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert processes.collected == [1002, 1001]


async def test_a_program_that_cannot_be_killed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "KILL_TIMEOUT", 0.2)
    agent, fake = pair
    Processes(fake)
    fake.answers["guest-exec-status"] = {"exited": False}
    with pytest.raises(DeadlineExceeded):
        await agent.run(["sleep", "60"], timeout=0.1)


async def test_questions_become_rare(pair: Pair) -> None:
    agent, fake = pair
    processes = Processes(fake)
    processes.questions = 10**9
    with pytest.raises(DeadlineExceeded):
        await agent.run(["sleep", "60"], timeout=1)
    asked = [command for command, _ in fake.calls].count("guest-exec-status")
    assert asked <= 15


async def test_programs_that_cannot_be_run(pair: Pair) -> None:
    agent, fake = pair
    Processes(fake)
    fake.answers["guest-exec"] = RuntimeError(
        'Guest command failed: Failed to execute child process "x" (No such file or directory)'
    )
    with pytest.raises(QgaNotStarted, match=r"refuses guest-exec: Guest command failed: .* \(No such file") as caught:
        await agent.run(["x"], timeout=10)
    assert caught.value.missing
    fake.answers["guest-exec"] = RuntimeError("Failed to execute child process “/etc” (Permission denied)")
    with pytest.raises(QgaNotStarted, match="Permission denied") as caught:
        await agent.run(["/etc"], timeout=10)
    assert not caught.value.missing
    fake.answers["guest-exec"] = RuntimeError("Invalid parameter")
    with pytest.raises(QgaError, match="refuses guest-exec: Invalid parameter") as other:
        await agent.run(["x"], timeout=10)
    assert not isinstance(other.value, QgaNotStarted)
    for argv in ([], [""]):
        with pytest.raises(InvalidArgument, match="there is no program"):
            await agent.run(argv, timeout=10)
    with pytest.raises(InvalidArgument, match="the input has 4194305 bytes; 4194304 can be passed"):
        await agent.run(["x"], timeout=10, stdin=bytes(4 * 1024 * 1024 + 1))
    for argv in (["x", "a\0b"], ["x", "y" * 3_000_000]):
        with pytest.raises(InvalidArgument, match="the arguments have a NUL character, or more than"):
            await agent.run(argv, timeout=10)


async def test_an_agent_that_is_not_to_run_programs(pair: Pair) -> None:
    agent, fake = pair
    fake.answers["guest-info"]["supported_commands"] = [{"name": "guest-exec", "enabled": False}]
    with pytest.raises(
        QgaUnsupported, match=r"does not do guest-exec \(update it, or let it: block-rpcs and allow-rpcs"
    ):
        await agent.run(["x"], timeout=10)
    fake.answers["guest-info"]["supported_commands"] = [{"name": "guest-exec"}, {"name": "guest-exec-status"}]
    Processes(fake)
    await agent.run(["x"], timeout=10)


@pytest.mark.parametrize(
    ("command", "answer", "words"),
    [
        ("guest-exec", {"pid": 0}, "the answer to guest-exec: Expected `int` >= 1"),
        ("guest-exec", {"pid": "1"}, "the answer to guest-exec: Expected `int`, got `str`"),
        ("guest-exec", {}, "missing required field `pid`"),
        ("guest-exec-status", {"exited": True}, "says that a process has ended, and not how"),
        ("guest-exec-status", {"exited": True, "exitcode": -1}, "Expected `int` >= 0"),
        ("guest-exec-status", {"exited": True, "signal": 65}, "Expected `int` <= 64"),
        ("guest-exec-status", {"exited": True, "exitcode": 0, "out-data": "!"}, "an output is not base64"),
        ("guest-info", {"version": "7"}, "missing required field `supported_commands`"),
    ],
)
async def test_lies_about_programs(pair: Pair, command: str, answer: Any, words: str) -> None:
    agent, fake = pair
    Processes(fake)
    fake.answers[command] = answer
    with pytest.raises(QgaLied) as lie:
        await agent.run(["x"], timeout=10)
    assert words in str(lie.value)


async def test_interfaces(pair: Pair) -> None:
    agent, fake = pair
    counters = {
        "rx-bytes": 1,
        "rx-packets": 2,
        "rx-errs": 3,
        "rx-dropped": 4,
        "tx-bytes": 5,
        "tx-packets": 6,
        "tx-errs": 7,
        "tx-dropped": 8,
    }
    fake.answers["guest-network-get-interfaces"] = [
        {"name": "lo", "hardware-address": "00:00:00:00:00:00",
         "ip-addresses": [{"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}]},
        {"name": "eth0\n", "hardware-address": "0A:58:0A:58:00:05", "statistics": counters,
         "ip-addresses": [{"ip-address": "fe80::1%eth0", "ip-address-type": "ipv6", "prefix": 64}]},
        {"name": "eth1"},
    ]  # fmt: skip
    assert await agent.interfaces() == [
        GuestInterface(name="lo", mac="00:00:00:00:00:00", addresses=[GuestAddress("127.0.0.1", 8)]),
        GuestInterface(name="eth0", mac="0a:58:0a:58:00:05", addresses=[GuestAddress("fe80::1", 64)], traffic=Traffic(1, 2, 3, 4, 5, 6, 7, 8)),
        GuestInterface(name="eth1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        {}, [{}], [{"name": 1}], [{"name": "x" * 5000}], [{"name": "x"}] * 5000,
        [{"name": "x", "ip-addresses": [{"ip-address": "elsewhere", "prefix": 1}]}],
        [{"name": "x", "ip-addresses": [{"ip-address": "1.2.3.4", "prefix": 129}]}],
        [{"name": "x", "statistics": {"rx-bytes": -1}}],
        [{"name": "x", "statistics": {"rx-bytes": 2**63}}],
    ],
)  # fmt: skip
async def test_lies_about_interfaces(pair: Pair, answer: Any) -> None:
    agent, fake = pair
    fake.answers["guest-network-get-interfaces"] = answer
    with pytest.raises(QgaLied, match="the answer to guest-network-get-interfaces: "):
        await agent.interfaces()


async def test_filesystems(pair: Pair) -> None:
    agent, fake = pair
    fake.answers["guest-get-fsinfo"] = [
        {"name": "vda1", "mountpoint": "/", "type": "ext4", "used-bytes": 5, "total-bytes": 10, "disk": [{"bus": 0}]},
        {"name": "vda15", "mountpoint": "/boot/efi\x1b", "type": "vfat", "disk": []},
    ]
    assert await agent.filesystems() == [
        GuestFilesystem("vda1", "/", "ext4", 5, 10),
        GuestFilesystem("vda15", "/boot/efi", "vfat"),
    ]
    fake.answers["guest-get-fsinfo"] = [{"name": "x", "mountpoint": "/", "type": "y", "used-bytes": -1}]
    with pytest.raises(QgaLied, match="the answer to guest-get-fsinfo: "):
        await agent.filesystems()


async def test_info(pair: Pair) -> None:
    agent, fake = pair
    fake.answers["guest-info"]["supported_commands"].append(
        {"name": "guest-off", "enabled": False, "success-response": True}
    )
    for _ in range(2):
        found = await agent.info()
    assert found.version == "7.2.0"
    assert "guest-exec" in found.commands
    assert "guest-off" not in found.commands
    assert len(fake.calls) == 1


async def test_shutdown(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SHUTDOWN_GRACE", 0.1)
    agent, fake = pair
    await agent.shutdown()  # which is not answered
    await agent.shutdown("reboot")
    assert fake.calls == [("guest-shutdown", {"mode": "powerdown"}), ("guest-shutdown", {"mode": "reboot"})]
    monkeypatch.setattr(client, "SHUTDOWN_GRACE", 10)
    fake.answers["guest-shutdown"] = RuntimeError("not now")
    with pytest.raises(QgaError, match="refuses guest-shutdown: not now"):
        await agent.shutdown()

    def off(_: dict[str, Any]) -> object:
        fake.writer.transport.abort()
        return NOTHING

    fake.answers["guest-shutdown"] = off
    await agent.shutdown()
    with pytest.raises(QgaGone):
        await agent.shutdown()


async def test_a_shutdown_that_nobody_hears(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.1)
    agent, fake = pair
    fake.listening.clear()
    with pytest.raises(QgaSilent, match="answered guest-shutdown within 0.1 s"):
        await agent.shutdown()
    async with agent._channel._turn:
        with pytest.raises(QgaSilent):
            await agent.shutdown()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["name", "pid", "exited", "exitcode", "out-data", "type", "mountpoint", "ip-addresses", "prefix"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_any_answer_is_read_or_called_a_lie(value: Any) -> None:
    for read in (answers.info, answers.interfaces, answers.filesystems, answers.pid, answers.exec_status):
        try:
            read(value)
        except QgaLied as lie:
            assert lie.message
