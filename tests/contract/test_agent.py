"""What every agent does: in memory, in memory behind the real client, and in a real guest over vsock.

One guest serves all tests of a module, so each test names its containers after itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.hosts import make_busybox_layer, open_host, qemu_hypervisor, sandbox, short_directory
from vmruntime.agent.client import AgentClient
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.fake import FakeAgent, FakeGuest
from vmruntime.agent.fake_server import FakeAgentServer
from vmruntime.agent.interface import (
    RECORD_LIMIT,
    Agent,
    GuestContainer,
    GuestContainerState,
    GuestPhase,
    GuestSetup,
    PidMode,
)
from vmruntime.agent.relay import Relay, UnixDialer
from vmruntime.errors import Code
from vmruntime.model.output import OutputRecord
from vmruntime.model.sandbox import Dns
from vmruntime.model.streams import AttachSpec, ExecSpec, TerminalSize
from vmruntime.sandboxes.interface import LayerDisk

pytestmark = pytest.mark.asyncio(loop_scope="module")

SANDBOX = "ab" * 32
PATIENCE = 60.0
LAYERS = ["1" * 32, "2" * 32]


class Place:
    """A guest and ways to connect to its agent.

    Attributes:
        agent: A connection that lasts.
        connect: Makes another one.
        scratch: Serial of the writable disk.
    """

    def __init__(self, agent: Agent, connect: Callable[[], Agent], scratch: str = "") -> None:
        self.agent = agent
        self.connect = connect
        self.scratch = scratch

    def setup(self, sandbox_id: str = SANDBOX) -> GuestSetup:
        return GuestSetup(
            sandbox_id=sandbox_id,
            hostname="guest-host",
            time_ns=time.time_ns(),
            entropy=b"x" * 64,
            interfaces=[],
            routes=[],
            dns=Dns(servers=["192.0.2.1"]),
            sysctls={},
            scratch_serial=self.scratch,
            shared_pid_namespace=False,
        )

    async def run(self, name: str, script: str, *, user: str = "", layers: list[str] = LAYERS[:1]) -> None:
        """Create and start a shell script."""
        await self.agent.create(container(name, ["/bin/sh", "-c", script], user=user, layers=layers))
        await self.agent.start(name)

    async def ended(self, name: str) -> GuestContainerState:
        """Wait until a container has exited, and return how."""
        async with asyncio.timeout(PATIENCE):
            async for state in self.agent.events():
                if state.id == name and state.phase is GuestPhase.EXITED:
                    return state
        raise AssertionError("the events ended")

    async def output(self, name: str, after: int = 0) -> list[OutputRecord]:
        """Read and acknowledge to the end."""
        records: list[OutputRecord] = []
        async with asyncio.timeout(PATIENCE):
            while True:
                # The connection may end under an acknowledgement: then reading goes on after what is acknowledged.
                with contextlib.suppress(AgentGone):
                    async with self.agent.output(name, after + len(records)) as reader:
                        async for record in reader:
                            records.append(record)
                            await reader.acknowledge(record.seq)
                    return records


def container(
    name: str, argv: list[str], *, user: str = "", layers: list[str] = LAYERS[:1], **fields: object
) -> GuestContainer:
    spec = {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": argv, "env": ["PATH=/bin"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "cgroup"}]},
    }
    given: dict[str, object] = {
        "id": name,
        "oci_spec": json.dumps(spec).encode(),
        "layer_serials": layers,
        "readonly_rootfs": False,
        "user": user,
        "groups": [],
        "image_groups": True,
        "pid_mode": PidMode.CONTAINER,
    }
    return GuestContainer(**(given | fields))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def in_memory(base: Path) -> AsyncIterator[Place]:
    guest = FakeGuest(disks=lambda: set(LAYERS))
    yield Place(FakeAgent(guest), lambda: FakeAgent(guest))
    await guest.die()


@contextlib.asynccontextmanager
async def over_grpc(base: Path) -> AsyncIterator[Place]:
    guest = FakeGuest(disks=lambda: set(LAYERS))
    server = FakeAgentServer(guest)
    await server.start(base / "guest.sock")
    relay = Relay(base / "agent.sock", UnixDialer(base / "guest.sock"))
    await relay.open()
    agent = AgentClient(base / "agent.sock")
    yield Place(agent, lambda: AgentClient(base / "agent.sock"))
    await agent.close()
    await relay.close()
    await guest.die()
    await server.stop()


@contextlib.asynccontextmanager
async def in_a_vm(base: Path) -> AsyncIterator[Place]:
    image = make_busybox_layer(base)
    async with open_host(base, qemu_hypervisor()) as host:
        running = await host.backend.start(sandbox(SANDBOX))
        await running.attach_layers([LayerDisk(path=image, serial=serial) for serial in LAYERS])
        socket = host.paths.sandbox(SANDBOX) / "agent.sock"
        yield Place(running.agent, lambda: AgentClient(socket), running.scratch_serial)
        await running.close()
        await host.backend.release(SANDBOX, final=True)


IMPLEMENTATIONS = [
    pytest.param(in_memory, id="memory"),
    pytest.param(over_grpc, id="grpc"),
    pytest.param(in_a_vm, id="vm", marks=pytest.mark.vm),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=IMPLEMENTATIONS)
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """One guest for the module, set up."""
    with short_directory() as directory:
        async with request.param(directory) as place:
            assert (await place.agent.hello()).sandbox_id == ""
            await place.agent.setup(place.setup())
            yield place


async def test_hello_tells_who_answers(place: Place) -> None:
    hello = await place.agent.hello()
    assert (hello.sandbox_id, hello.uptime_us >= hello.started_us > 0) == (SANDBOX, True)
    assert hello.version
    assert hello.kernel


async def test_setup_again_is_success_and_another_sandbox_is_refused(place: Place) -> None:
    await place.agent.setup(place.setup())
    with pytest.raises(AgentError, match="serves sandbox") as refusal:
        await place.agent.setup(place.setup("cd" * 32))
    assert refusal.value.code is Code.FAILED_PRECONDITION


async def test_a_container_from_create_to_delete(place: Place) -> None:
    agent = place.agent
    pid, user = await agent.create(container("life", ["/bin/sh", "-c", "hostname; exit 3"]))
    assert pid > 0
    assert (user.uid, user.gid) == (0, 0)
    created = {state.id: state for state in await agent.containers()}["life"]
    assert (created.phase, created.started_at, created.exited_at) == (GuestPhase.CREATED, 0, 0)
    before = time.time_ns() - 60 * 10**9
    started_at = await agent.start("life")
    assert before < started_at < time.time_ns() + 60 * 10**9
    state = await place.ended("life")
    assert (state.exit_code, state.oom_killed, state.started_at) == (3, False, started_at)
    assert state.exited_at >= started_at
    assert [(record.stderr, record.data) for record in await place.output("life")] == [(False, b"guest-host")]
    assert await agent.delete("life") == LAYERS[:1]
    assert "life" not in {state.id for state in await agent.containers()}


async def test_a_layer_is_released_by_its_last_user(place: Place) -> None:
    for name, layers in (("one", LAYERS[:1]), ("two", LAYERS)):
        await place.agent.create(container(name, ["/bin/sleep", "1000"], layers=layers))
    assert await place.agent.delete("one") == []
    assert sorted(await place.agent.delete("two")) == LAYERS
    assert await place.agent.delete("two") == []


async def test_what_cannot_be_created(place: Place) -> None:
    agent = place.agent
    await agent.create(container("taken", ["/bin/sleep", "1000"]))
    refused = [
        (container("taken", ["/bin/true"]), Code.ALREADY_EXISTS, "exists"),
        (container("../up", ["/bin/true"]), Code.INVALID_ARGUMENT, "container id"),
        (container("twice", ["/bin/true"], layers=[LAYERS[0], LAYERS[0]]), Code.INVALID_ARGUMENT, "named twice"),
        (container("who", ["/bin/true"], user="nobody-here"), Code.INVALID_ARGUMENT, "nobody-here"),
        (container("typo", ["/bin/typo"]), Code.INVALID_ARGUMENT, "^exec: .*executable file not found"),
        (container("pod", ["/bin/true"], pid_mode=PidMode.POD), Code.FAILED_PRECONDITION, "shared PID namespace"),
        (
            container("target", ["/bin/true"], pid_mode=PidMode.TARGET, pid_target="unknown"),
            Code.NOT_FOUND,
            "unknown",
        ),
    ]
    for request, code, words in refused:
        with pytest.raises(AgentError, match=words) as refusal:
            await agent.create(request)
        assert refusal.value.code is code, request.id
    assert {state.id for state in await agent.containers()} == {"taken"}
    assert await agent.delete("taken") == LAYERS[:1]


async def test_a_container_starts_once(place: Place) -> None:
    agent = place.agent
    await place.run("once", "sleep 1000")
    with pytest.raises(AgentError, match="running") as refusal:
        await agent.start("once")
    assert refusal.value.code is Code.FAILED_PRECONDITION
    with pytest.raises(AgentError) as refusal:
        await agent.start("nobody")
    assert refusal.value.code is Code.NOT_FOUND
    await agent.delete("once")


async def test_the_user_is_the_images(place: Place) -> None:
    _, user = await place.agent.create(container("user", ["/bin/sh", "-c", "id -u"], user="web"))
    assert (user.uid, user.gid) == (1001, 1002)
    assert 1003 in user.groups
    await place.agent.start("user")
    assert [record.data for record in await place.output("user")] == [b"1001"]
    await place.agent.delete("user")


async def test_signals(place: Place) -> None:
    agent = place.agent
    await place.run("handles", "trap 'exit 5' TERM; echo ready; sleep 1000 & wait")
    await place.run("ignores", "echo ready; sleep 1000")
    await agent.create(container("waits", ["/bin/sleep", "1000"]))
    for name in ("handles", "ignores"):
        async with asyncio.timeout(PATIENCE), agent.output(name, 0) as reader:
            async for record in reader:
                assert record.data == b"ready"
                break
        await agent.signal(name, signal.SIGTERM)
    assert (await place.ended("handles")).exit_code == 5
    await agent.signal("handles", signal.SIGTERM)  # it has exited: success
    assert {one.id: one.phase for one in await agent.containers()}["ignores"] is GuestPhase.RUNNING
    await agent.signal("ignores", signal.SIGKILL, everyone=True)
    assert (await place.ended("ignores")).exit_code == 137
    await agent.signal("waits", signal.SIGKILL)
    assert (await place.ended("waits")).exit_code == 137
    for number, code in ((0, Code.INVALID_ARGUMENT), (65, Code.INVALID_ARGUMENT), (15, Code.NOT_FOUND)):
        with pytest.raises(AgentError) as refusal:
            await agent.signal("nobody", number)
        assert refusal.value.code is code
    for name in ("handles", "ignores", "waits"):
        await agent.delete(name)


async def test_output_is_numbered_and_cut_into_records(place: Place) -> None:
    long = "y" * (RECORD_LIMIT + 1)
    await place.run("cut", f"echo one; echo bad >&2; echo {long}")
    records = await place.output("cut")
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [record.data for record in records if record.stderr] == [b"bad"]
    out = [(record.partial, record.data) for record in records if not record.stderr]
    assert out == [(False, b"one"), (True, b"y" * RECORD_LIMIT), (False, b"y")]
    assert all(abs(record.time_ns - time.time_ns()) < 3600 * 10**9 for record in records)
    await place.agent.delete("cut")


async def test_output_resumes_after_what_was_acknowledged(place: Place) -> None:
    agent = place.agent
    await place.run("resume", "; ".join(f"echo {number}" for number in range(1, 6)))
    await place.ended("resume")
    async with agent.output("resume", 0) as reader:
        async for record in reader:
            if record.seq == 3:
                break
        await reader.acknowledge(2)
    assert [record.data for record in await place.output("resume", 2)] == [b"3", b"4", b"5"]
    assert await place.output("resume", 5) == []
    with pytest.raises(AgentError, match="OUT_OF_RANGE"):
        await place.output("resume", 6)
    await agent.delete("resume")
    with pytest.raises(AgentError) as refusal:
        await place.output("resume")
    assert refusal.value.code is Code.NOT_FOUND


async def test_a_second_reader_takes_over(place: Place) -> None:
    await place.run("over", "echo one; sleep 1000")
    async with place.agent.output("over", 0) as first:
        records = aiter(first)
        assert (await anext(records)).data == b"one"
        async with place.agent.output("over", 0) as second:
            assert (await anext(aiter(second))).data == b"one"
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(AgentError) as end:
                    await anext(records)
        assert end.value.code is Code.ABORTED
    await place.agent.delete("over")


async def test_deleting_ends_the_output(place: Place) -> None:
    await place.run("cut-off", "echo one; sleep 1000")
    seen = []
    async with asyncio.timeout(PATIENCE), place.agent.output("cut-off", 0) as reader:
        async for record in reader:
            seen.append(record.data)
            await place.agent.delete("cut-off")
    assert seen == [b"one"]


async def test_a_container_waits_while_nobody_acknowledges(place: Place) -> None:
    line = "z" * 8000
    await place.run("full", "; ".join(f"echo {line}" for _ in range(15)) + "; " + "; ".join(["true"] * 3))
    await place.run("fuller", "; ".join(["echo " + "z" * 800] * 100))
    for name, count in (("full", 15), ("fuller", 100)):
        records = await place.output(name)
        assert [record.seq for record in records] == list(range(1, count + 1))
        await place.agent.delete(name)


async def test_exec(place: Place) -> None:
    agent = place.agent
    await place.run("exec", "sleep 1000", user="web")
    done = await agent.exec_sync("exec", ["/bin/sh", "-c", "id -u; echo bad >&2; exit 7"], 30, 1 << 20)
    assert (done.stdout, done.stderr, done.end.exit_code, done.end.timed_out) == (b"1001\n", b"bad\n", 7, False)
    assert (await agent.exec_sync("exec", ["true"], 0, 1 << 20)).end.exit_code == 0
    missing = await agent.exec_sync("exec", ["no-such"], 30, 1 << 20)
    assert missing.end.exit_code == 127
    assert "not found" in missing.end.error
    cut = await agent.exec_sync("exec", ["echo", "0123456789"], 30, 4)
    assert cut.stdout == b"0123"
    late = await agent.exec_sync("exec", ["sleep", "60"], 0.5, 1 << 20)
    assert late.end.timed_out
    assert late.end.exit_code != 0
    with pytest.raises(AgentError) as refusal:
        await agent.exec_sync("exec", [], 30, 1 << 20)
    assert refusal.value.code is Code.INVALID_ARGUMENT
    under_way = asyncio.ensure_future(agent.exec_sync("exec", ["sleep", "60"], 0, 1 << 20))
    await asyncio.sleep(0.5)
    await agent.signal("exec", signal.SIGKILL, everyone=True)
    async with asyncio.timeout(PATIENCE):
        assert (await under_way).end.exit_code == 137
    await place.ended("exec")
    for name, code in (("exec", Code.FAILED_PRECONDITION), ("nobody", Code.NOT_FOUND)):
        with pytest.raises(AgentError) as refusal:
            await agent.exec_sync(name, ["true"], 30, 1 << 20)
        assert refusal.value.code is code
    await agent.delete("exec")


async def test_exec_with_streams(place: Place) -> None:
    agent = place.agent
    await place.run("streams", "sleep 1000")
    async with asyncio.timeout(PATIENCE), agent.exec(ExecSpec(container_id="streams", argv=["cat"], stdin=True)) as cat:
        await cat.write(b"hello ")
        await cat.write(b"world")
        await cat.resize(TerminalSize(columns=80, rows=25))  # it has no terminal: nothing
        await cat.close_input()
        assert b"".join([chunk.data async for chunk in cat.output()]) == b"hello world"
        assert (cat.end.exit_code, cat.end.error) == (0, "")
    async with agent.exec(ExecSpec(container_id="streams", argv=["no-such"])) as missing:
        assert [chunk async for chunk in missing.output() if chunk.data] == []
        assert missing.end.exit_code == 127
    async with agent.exec(ExecSpec(container_id="nobody", argv=["true"])) as nobody:
        with pytest.raises(AgentError) as refusal:
            await anext(aiter(nobody.output()))
        assert refusal.value.code is Code.NOT_FOUND
    await agent.delete("streams")


async def test_attach(place: Place) -> None:
    agent = place.agent
    script = ["/bin/sh", "-c", "cat; echo bye; exit 6"]
    await agent.create(container("attach", script, stdin=True, stdin_once=True))
    async with asyncio.timeout(PATIENCE), agent.attach(AttachSpec(container_id="attach", stdin=True)) as joined:
        output = aiter(joined.output())
        assert (await anext(output)).data == b"", "from here on nothing is missed"
        await agent.start("attach")
        await joined.write(b"hello\n")
        await joined.close_input()
        assert b"".join([chunk.data async for chunk in output]) == b"hello\nbye\n"
        assert not joined.too_slow
    assert (await place.ended("attach")).exit_code == 6
    assert [record.data for record in await place.output("attach")] == [b"hello", b"bye"], "the log has it too"
    async with agent.attach(AttachSpec(container_id="attach")) as late:
        with pytest.raises(AgentError) as refusal:
            await anext(aiter(late.output()))
        assert refusal.value.code is Code.FAILED_PRECONDITION
    await agent.delete("attach")


async def test_nobody_listens_on_a_port(place: Place) -> None:
    async with asyncio.timeout(PATIENCE), place.agent.ports() as ports:
        with pytest.raises(AgentError) as refusal:
            async with ports.connect(9):
                pass
        assert refusal.value.code is Code.FAILED_PRECONDITION


async def test_update(place: Place) -> None:
    agent = place.agent
    await place.run("update", "sleep 1000")
    await agent.update("update", json.dumps({"memory": {"limit": 64 << 20}}).encode())
    with pytest.raises(AgentError) as refusal:
        await agent.update("nobody", b"{}")
    assert refusal.value.code is Code.NOT_FOUND
    await agent.signal("update", signal.SIGKILL)
    await place.ended("update")
    with pytest.raises(AgentError) as refusal:
        await agent.update("update", b"{}")
    assert refusal.value.code is Code.FAILED_PRECONDITION
    await agent.delete("update")
    await agent.online_cpus(1)


async def test_events_begin_with_the_whole_picture(place: Place) -> None:
    agent = place.agent
    await agent.create(container("seen", ["/bin/sh", "-c", "exit 4"]))
    other = place.connect()
    phases: dict[str, list[GuestPhase]] = {"early": [], "late": []}

    async def listen(who: str, source: Agent) -> None:
        async for state in source.events():
            if state.id == "seen":
                phases[who].append(state.phase)
            if state.phase is GuestPhase.EXITED:
                return

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(listen("early", other))
        while not phases["early"]:
            await asyncio.sleep(0.01)
        await agent.start("seen")
    async with asyncio.timeout(PATIENCE):
        await listen("late", agent)
    assert phases == {"early": [GuestPhase.CREATED, GuestPhase.RUNNING, GuestPhase.EXITED], "late": [GuestPhase.EXITED]}
    await other.close()
    await agent.delete("seen")


async def test_stats(place: Place) -> None:
    agent = place.agent
    for name in ("stat-one", "stat-two"):
        await place.run(name, "sleep 1000")
    everything = await agent.stats([])
    assert {usage.id for usage in everything.containers} == {"stat-one", "stat-two"}
    assert everything.memory_total > everything.memory_available > 0
    (one,) = (await agent.stats(["stat-one", "nobody"])).containers  # one removed meanwhile costs nobody the numbers
    assert one.id == "stat-one"
    assert one.time > 0
    assert (await agent.stats(["nobody"])).containers == []
    for name in ("stat-one", "stat-two"):
        await agent.delete(name)


async def test_a_closed_connection_is_gone(place: Place) -> None:
    agent = place.connect()
    assert (await agent.hello()).sandbox_id == SANDBOX
    listening = asyncio.ensure_future(anext(aiter(agent.events())))
    await asyncio.sleep(0.1)
    await agent.close()
    async with asyncio.timeout(PATIENCE):
        for call in (listening, agent.hello(), agent.containers()):
            with pytest.raises(AgentGone):
                await call
    assert (await place.agent.hello()).sandbox_id == SANDBOX, "the others go on"
