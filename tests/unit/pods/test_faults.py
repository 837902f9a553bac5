"""Every step of every use case fails, gets its answer lost, or is waited for by nobody: nothing is left, and a retry works.

The steps are counted, not listed, so that a new one is covered by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.unit.pods.bed import PATIENCE, Daemon, Killed, World, daemon_on
from vmruntime.agent.errors import AgentGone
from vmruntime.aio.faults import EVERY_STEP, Faults
from vmruntime.errors import AlreadyExists, Internal, NotFound, VmruntimeError
from vmruntime.model.container import ContainerState, Device, Mount
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import SandboxState

STEPS_LIMIT = 200
BIG = LinuxResources(memory_limit=4 << 30)


class Case:
    """A use case with its pod.

    Attributes:
        pod, container: Those it works on.
    """

    pod = ""
    container = ""

    def __init__(self, files: Path) -> None:
        self.files = files

    async def prepare(self, daemon: Daemon) -> None:
        """Bring about what the use case needs."""
        self.pod = await daemon.run_pod()

    async def call(self, daemon: Daemon) -> None:
        """Call it, as a client does again when it failed."""
        raise NotImplementedError

    def check(self, daemon: Daemon) -> None:
        """Check that it succeeded."""
        raise NotImplementedError

    def check_failed(self, daemon: Daemon) -> None:
        """Check what there is when it has failed."""

    async def create(self, daemon: Daemon) -> str:
        device = Device(container_path="/dev/x", host_path="/dev/loop9", permissions="rw")
        volume = Mount(container_path="/v", host_path=str(self.files))
        image = Mount(container_path="/i", image="docker.io/library/data:1")
        return await daemon.create(self.pod, mounts=[volume, image], devices=[device], resources=BIG)


class RunSandbox(Case):
    async def prepare(self, daemon: Daemon) -> None:
        return

    async def call(self, daemon: Daemon) -> None:
        self.pod = await daemon.run_pod()

    def check(self, daemon: Daemon) -> None:
        assert daemon.pods.sandbox(self.pod).state is SandboxState.READY

    def check_failed(self, daemon: Daemon) -> None:
        assert daemon.pods.sandboxes() == []


class CreateContainer(Case):
    async def call(self, daemon: Daemon) -> None:
        self.container = await self.create(daemon)

    def check(self, daemon: Daemon) -> None:
        assert daemon.pods.container(self.container).state is ContainerState.CREATED

    def check_failed(self, daemon: Daemon) -> None:
        daemon.pod_as_new(self.pod)


class StartContainer(CreateContainer):
    async def prepare(self, daemon: Daemon) -> None:
        await super().prepare(daemon)
        self.container = await self.create(daemon)

    async def call(self, daemon: Daemon) -> None:
        if daemon.pods.container(self.container).state is ContainerState.CREATED:
            await daemon.pods.start_container(self.container)

    def check(self, daemon: Daemon) -> None:
        assert daemon.pods.container(self.container).state is ContainerState.RUNNING

    def check_failed(self, daemon: Daemon) -> None:
        return


class StopContainer(StartContainer):
    async def prepare(self, daemon: Daemon) -> None:
        await super().prepare(daemon)
        await daemon.pods.start_container(self.container)

    async def call(self, daemon: Daemon) -> None:
        await daemon.pods.stop_container(self.container, 0.01)

    def check(self, daemon: Daemon) -> None:
        assert daemon.pods.container(self.container).state is ContainerState.EXITED


class RemoveContainer(StopContainer):
    async def call(self, daemon: Daemon) -> None:
        await daemon.pods.remove_container(self.container)

    def check(self, daemon: Daemon) -> None:
        daemon.pod_as_new(self.pod)


class UpdateContainer(StopContainer):
    async def call(self, daemon: Daemon) -> None:
        await daemon.pods.update_container(self.container, LinuxResources(memory_limit=6 << 30))

    def check(self, daemon: Daemon) -> None:
        size = daemon.machine(self.pod).size
        assert size is not None
        assert size.memory_mib > 6144
        assert daemon.pods.container(self.container).spec.resources.memory_limit == 6 << 30


class StopSandbox(StopContainer):
    async def call(self, daemon: Daemon) -> None:
        await daemon.pods.stop_sandbox(self.pod)

    def check(self, daemon: Daemon) -> None:
        assert daemon.pods.sandbox(self.pod).state is SandboxState.NOTREADY
        assert daemon.pods.container(self.container).state is ContainerState.EXITED
        assert daemon.world.backend.running == []
        assert daemon.world.network.attached == {}


class RemoveSandbox(StopContainer):
    async def call(self, daemon: Daemon) -> None:
        await daemon.pods.remove_sandbox(self.pod)

    def check(self, daemon: Daemon) -> None:
        assert daemon.pods.sandboxes() == []
        with pytest.raises(NotFound):
            daemon.pods.container(self.container)


CASES: list[type[Case]] = [
    RunSandbox,
    CreateContainer,
    StartContainer,
    StopContainer,
    RemoveContainer,
    UpdateContainer,
    StopSandbox,
    RemoveSandbox,
]

Attempt = Callable[[int], Awaitable[bool]]


async def each_step(attempt: Attempt) -> int:
    """Try with step 0, 1, 2, … until one is not reached any more; return how many there were."""
    for number in range(STEPS_LIMIT):
        async with asyncio.timeout(PATIENCE):
            if not await attempt(number):
                return number
    raise AssertionError("the steps do not end")


@pytest.fixture(autouse=True)
def little_patience_with_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmruntime.pods.leftovers.FIRST_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.pods.monitor.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.pods.monitor.RECORD_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.pods.log_pump.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.pods.vm_end.MOMENT", 0.01)  # no VM ends here by itself
    monkeypatch.setattr("vmruntime.pods.sandbox_stop.CONTAINER_GRACE", 0.002)  # nor does a container


@pytest.fixture(params=["fails", "broken"])
def error(request: pytest.FixtureRequest) -> VmruntimeError:
    return {"fails": Internal("this step fails"), "broken": AgentGone("this step breaks the connection")}[request.param]


@pytest.mark.parametrize("kind", CASES)
async def test_a_step_fails(tmp_path: Path, kind: type[Case], error: VmruntimeError) -> None:
    async def attempt(number: int) -> bool:
        async with daemon_on(tmp_path / str(number)) as daemon:
            case = kind(tmp_path)
            await case.prepare(daemon)
            daemon.faults.steps.clear()
            daemon.faults.fail(EVERY_STEP, error, skip=number)
            failed = await outcome(case, daemon)
            if failed is not None:
                assert "this step" in str(failed), daemon.faults.steps[number]
                await leftovers_gone(daemon)
                case.check_failed(daemon)
            reached = len(daemon.faults.steps) > number
            daemon.faults._orders.clear()
            if failed is not None:
                await case.call(daemon)
            case.check(daemon)
            return reached

    assert await each_step(attempt) > 3


async def outcome(case: Case, daemon: Daemon) -> VmruntimeError | None:
    try:
        await case.call(daemon)
    except VmruntimeError as error:
        return error
    return None


async def leftovers_gone(daemon: Daemon) -> None:
    """Wait until what an undo could not release at first is released in the background."""
    known = {sandbox.id for sandbox in daemon.context.registry.sandboxes(hidden=True)}
    while {resource.owner for resource in await daemon.owned.ledger.all()} - known:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", CASES)
async def test_a_caller_goes_away(tmp_path: Path, kind: type[Case]) -> None:
    """kubelet's call times out at each step in turn; its next one succeeds."""

    async def attempt(number: int) -> bool:
        async with daemon_on(tmp_path / str(number)) as daemon:
            case = kind(tmp_path)
            await case.prepare(daemon)
            hold = daemon.faults.hold(EVERY_STEP, skip=number)
            call = asyncio.ensure_future(case.call(daemon))
            reached = asyncio.ensure_future(hold.reached.wait())
            await asyncio.wait({call, reached}, return_when=asyncio.FIRST_COMPLETED)
            was_reached = reached.done()
            reached.cancel()
            if not call.done():
                call.cancel()
                await asyncio.sleep(0)
                hold.release()
                await asyncio.wait({call})
                await case.call(daemon)
            hold.release()
            case.check(daemon)
            return was_reached

    assert await each_step(attempt) > 3


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[Callable[[int], World]]:
    made: list[World] = []

    def make(number: int) -> World:
        made.append(World(tmp_path / str(number)))
        return made[-1]

    yield make
    for world in made:
        for machine in world.backend.machines.values():
            await machine.end("the test is over")


@pytest.mark.parametrize("kind", CASES)
async def test_the_daemon_is_killed(tmp_path: Path, worlds: Callable[[int], World], kind: type[Case]) -> None:
    """At each step in turn. The next daemon finishes or undoes; the client calls again and gets what it wanted."""

    async def attempt(number: int) -> bool:
        world = worlds(number)
        daemon = await Daemon.start(world)
        case = kind(tmp_path)
        await case.prepare(daemon)
        hold = daemon.faults.hold(EVERY_STEP, skip=number)
        call = asyncio.ensure_future(case.call(daemon))
        reached = asyncio.ensure_future(hold.reached.wait())
        await asyncio.wait({call, reached}, return_when=asyncio.FIRST_COMPLETED)
        was_reached = reached.done()
        reached.cancel()
        await daemon.kill()
        hold.release()
        call.cancel()
        await asyncio.wait({call})
        if not call.cancelled():
            call.exception()  # Killed, or what its end did to the call
        following = await Daemon.start(world)
        consistent(following)
        try:
            await case.call(following)
        except AlreadyExists:  # it was done; kubelet finds it in its next list
            (case.pod,) = [one.id for one in following.pods.sandboxes()]
            case.container = next((one.id for one in following.pods.containers()), "")
        case.check(following)
        for sandbox in following.pods.sandboxes():
            await following.pods.remove_sandbox(sandbox.id)
        await following.nothing_left()
        await following.stop()
        return was_reached

    assert await each_step(attempt) > 3


def consistent(daemon: Daemon) -> None:
    """Check what a daemon shows right after its start."""
    running = set(daemon.world.backend.running)
    for sandbox in daemon.pods.sandboxes():
        assert sandbox.state in (SandboxState.READY, SandboxState.NOTREADY)
        assert (sandbox.state is SandboxState.READY) == (sandbox.id in running)
        for container in daemon.context.registry.containers_of(sandbox.id, hidden=True):
            assert container.state not in (ContainerState.CREATING, ContainerState.REMOVING)
            if sandbox.state is SandboxState.NOTREADY:
                assert container.state is ContainerState.EXITED
            assert (container.state is ContainerState.EXITED) or container.id in daemon.context.live[sandbox.id].pumps
    assert {one for one in daemon.world.network.attached} <= {one.id for one in daemon.pods.sandboxes()}


async def test_a_daemon_that_was_killed_says_nothing_more(tmp_path: Path) -> None:
    """The test above means something: a killed daemon does not get as far as its undo."""
    world = World(tmp_path)
    daemon = await Daemon.start(world, Faults())
    hold = daemon.faults.hold("agent.setup")
    call = asyncio.ensure_future(daemon.run_pod())
    await hold.reached.wait()
    await daemon.kill()
    await asyncio.wait({call})
    assert len(world.backend.running) == len(world.network.attached) == 1
    with pytest.raises(Killed):
        await daemon.owned.release("anybody")
    following = await Daemon.start(world)
    await following.nothing_left()
    await following.stop()
