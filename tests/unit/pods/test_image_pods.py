"""The use cases of image pods: their lives, each step failing or cut off by the daemon's end, and what recovery makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from tests.support.fakes import without_qemu_img
from tests.unit.pods.bed import PATIENCE, state
from tests.unit.pods.image_bed import UP, ImageDaemon, ImageWorld, image_daemon, image_world
from tests.unit.pods.test_faults import each_step, leftovers_gone
from vmruntime.agent.errors import AgentGone
from vmruntime.aio.faults import EVERY_STEP
from vmruntime.errors import AlreadyExists, FailedPrecondition, Internal, VmruntimeError
from vmruntime.model.container import ContainerState
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import SandboxKind, SandboxState

IN_THE_GUEST = "vm.boot"
START_FAILED = 128


@pytest.fixture(autouse=True)
def little_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    without_qemu_img(monkeypatch)
    monkeypatch.setattr("vmruntime.pods.leftovers.FIRST_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.pods.monitor.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.pods.monitor.RECORD_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.pods.log_pump.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.pods.vm_end.MOMENT", 0.05)  # an image pod does not end by itself
    monkeypatch.setattr("vmruntime.aio.inotify.POLL_SECONDS", 0.01)
    monkeypatch.setattr("vmruntime.sandboxes.image_vm.machine.PRESS_SECONDS", 0.02)
    monkeypatch.setattr("vmruntime.sandboxes.image_vm.console_log.GATHER_SECONDS", 0.0)
    monkeypatch.setattr("vmruntime.sandboxes.image_vm.guest_link.ANSWER_SECONDS", 0.01)


@pytest.fixture
async def daemon() -> AsyncIterator[ImageDaemon]:
    async with image_daemon() as daemon:
        yield daemon


@pytest.fixture
async def world() -> AsyncIterator[ImageWorld]:
    async with image_world() as world:
        yield world


async def test_a_pod_lives_and_its_disk_with_it(daemon: ImageDaemon) -> None:
    pod = await daemon.run_image_pod()
    assert daemon.world.machines == []
    container = await daemon.run_vm(pod)
    machine = daemon.vm(pod)
    await machine.wait_for_line(UP)
    machine.say("login: ")
    machine.power_off()
    ended = await daemon.ended(container)
    assert (ended.exit_code, ended.reason, ended.message) == (0, "Completed", "the guest powered off")
    assert daemon.world.log("vm0") == f"stdout F {UP}\nstdout F login: "
    assert daemon.pods.sandbox(pod).state is SandboxState.READY
    second = await daemon.run_vm(pod, 1)
    assert daemon.vm(pod).spec.disks[0] == machine.spec.disks[0]
    await daemon.pods.remove_container(container)
    assert state(daemon, second) is ContainerState.RUNNING
    await daemon.pods.stop_container(second, PATIENCE)
    assert daemon.pods.container(second).exit_code == 0
    await daemon.pods.stop_sandbox(pod)
    assert {one.kind for one in await daemon.owned.ledger.all()} == {ResourceKind.DIRECTORY}
    await daemon.pods.remove_sandbox(pod)


@pytest.mark.parametrize(("end", "code"), [("panic", 1), ("crash", 137), ("lose", 255)])
async def test_a_machine_that_fails_is_told(daemon: ImageDaemon, end: str, code: int) -> None:
    pod = await daemon.run_image_pod()
    container = await daemon.run_vm(pod)
    if (ending := getattr(daemon.vm(pod), end)()) is not None:
        await ending
    ended = await daemon.ended(container)
    assert (ended.exit_code, ended.reason) == (code, "Error")
    assert daemon.pods.sandbox(pod).state is SandboxState.READY, "kubelet starts the container anew"


async def test_a_stop_that_takes_too_long_kills(daemon: ImageDaemon) -> None:
    pod = await daemon.run_image_pod()
    container = await daemon.run_vm(pod)
    daemon.vm(pod).obedient = False
    await daemon.pods.stop_container(container, 0.1)
    assert daemon.vm(pod).presses >= 2
    ended = daemon.pods.container(container)
    assert (ended.exit_code, ended.message) == (137, "the VM was ended: it did not shut down in time")


async def test_a_start_that_fails_says_why(daemon: ImageDaemon) -> None:
    pod = await daemon.run_image_pod()
    container = await daemon.create_vm(pod)
    daemon.faults.fail("network.open_taps", Internal("the taps are in use"))
    with pytest.raises(FailedPrecondition, match="could not be started: the taps are in use"):
        await daemon.pods.start_container(container)
    failed = daemon.pods.container(container)
    assert (failed.state, failed.exit_code, failed.reason) == (ContainerState.EXITED, START_FAILED, "StartError")
    assert failed.message == "the taps are in use"
    assert daemon.world.machines == []
    await daemon.run_vm(pod, 1)


async def test_a_second_container_is_refused(daemon: ImageDaemon) -> None:
    pod = await daemon.run_image_pod()
    first = await daemon.run_vm(pod)
    with pytest.raises(FailedPrecondition, match="is running already"):
        await daemon.create_vm(pod, 1)
    spec = daemon.vm_spec(0)
    with pytest.raises(FailedPrecondition, match="second container"):
        await daemon.pods.create_container(pod, replace(spec, metadata=replace(spec.metadata, name="other")))
    assert state(daemon, first) is ContainerState.RUNNING
    assert [one.id for one in daemon.pods.containers()] == [first]


async def test_two_pods_with_one_uuid(daemon: ImageDaemon) -> None:
    uuid = "5a2b3c4d-0000-4000-8000-00000000000a"
    first, second = await daemon.run_image_pod(system_uuid=uuid), await daemon.run_image_pod("b", system_uuid=uuid)
    running = await daemon.run_vm(first)
    refused = await daemon.create_vm(second)
    with pytest.raises(FailedPrecondition, match=rf"system-uuid: '{uuid}' is taken"):
        await daemon.pods.start_container(refused)
    await daemon.pods.remove_sandbox(second)
    assert state(daemon, running) is ContainerState.RUNNING
    assert len(daemon.world.machines) == 1


@pytest.mark.parametrize("step", ["vm.start", "vm.process qemu", "vm.start done", "vm.attach_nic", "vm.resume"])
async def test_a_pod_is_removed_while_its_machine_starts(daemon: ImageDaemon, step: str) -> None:
    pod = await daemon.run_image_pod()
    container = await daemon.create_vm(pod)
    hold = daemon.faults.hold(step)
    starting = asyncio.ensure_future(daemon.pods.start_container(container))
    await hold.reached.wait()
    removing = asyncio.ensure_future(daemon.pods.remove_sandbox(pod))
    await asyncio.sleep(0.05)
    hold.release()
    async with asyncio.timeout(PATIENCE):
        await removing
        await asyncio.wait({starting})
    if not starting.cancelled():
        assert starting.exception() is None or isinstance(starting.exception(), VmruntimeError)
    assert daemon.world.machines == []
    await daemon.nothing_left()


async def test_a_pod_is_removed_while_its_guest_boots(daemon: ImageDaemon) -> None:
    hold = daemon.faults.hold(IN_THE_GUEST)
    pod = await daemon.run_image_pod()
    await daemon.run_vm(pod)
    daemon.vm(pod).obedient = False
    await hold.reached.wait()
    async with asyncio.timeout(PATIENCE):
        await daemon.pods.remove_sandbox(pod)
    await daemon.nothing_left()


async def test_limits_that_come_before_the_container_count(daemon: ImageDaemon) -> None:
    pod = await daemon.run_image_pod()
    await daemon.pods.update_sandbox(pod, None, LinuxResources(memory_limit=3 << 30))
    await daemon.run_vm(pod)
    assert daemon.vm(pod).spec.size.memory_mib == 3072


class Case:
    """A use case with its pod."""

    pod = ""
    container = ""

    async def prepare(self, daemon: ImageDaemon) -> None:
        self.pod = await daemon.run_image_pod()

    async def call(self, daemon: ImageDaemon) -> None:
        """Call it, as a client does again when it failed."""
        raise NotImplementedError

    def check(self, daemon: ImageDaemon) -> None:
        """Check that it succeeded."""
        raise NotImplementedError

    def check_failed(self, daemon: ImageDaemon) -> None:
        """Check what there is when it has failed."""


class RunSandbox(Case):
    async def prepare(self, daemon: ImageDaemon) -> None:
        return

    async def call(self, daemon: ImageDaemon) -> None:
        self.pod = await daemon.run_image_pod()

    def check(self, daemon: ImageDaemon) -> None:
        assert daemon.pods.sandbox(self.pod).state is SandboxState.READY
        assert daemon.pods.sandbox(self.pod).spec.kind is SandboxKind.IMAGE

    def check_failed(self, daemon: ImageDaemon) -> None:
        assert daemon.pods.sandboxes() == []


class CreateContainer(Case):
    async def call(self, daemon: ImageDaemon) -> None:
        self.container = await daemon.create_vm(self.pod)

    def check(self, daemon: ImageDaemon) -> None:
        assert state(daemon, self.container) is ContainerState.CREATED
        assert daemon.world.machines == []

    def check_failed(self, daemon: ImageDaemon) -> None:
        daemon.pod_as_new(self.pod)


class StartContainer(CreateContainer):
    async def prepare(self, daemon: ImageDaemon) -> None:
        await super().prepare(daemon)
        self.container = await daemon.create_vm(self.pod)

    async def call(self, daemon: ImageDaemon) -> None:
        if state(daemon, self.container) is ContainerState.CREATED:
            await daemon.pods.start_container(self.container)

    def check(self, daemon: ImageDaemon) -> None:
        """A start that failed is told as such; kubelet makes the next container then."""
        container = daemon.pods.container(self.container)
        if container.state is ContainerState.EXITED:
            assert (container.reason, container.exit_code) == ("StartError", START_FAILED)
            assert daemon.world.machines == []
        else:
            assert container.state is ContainerState.RUNNING
            assert daemon.vm(self.pod).running

    def check_failed(self, daemon: ImageDaemon) -> None:
        return


class StopContainer(StartContainer):
    async def prepare(self, daemon: ImageDaemon) -> None:
        await super().prepare(daemon)
        await daemon.pods.start_container(self.container)

    async def call(self, daemon: ImageDaemon) -> None:
        await daemon.pods.stop_container(self.container, 0.05)

    def check(self, daemon: ImageDaemon) -> None:
        assert state(daemon, self.container) is ContainerState.EXITED
        assert daemon.world.machines == []


class RemoveContainer(StopContainer):
    async def call(self, daemon: ImageDaemon) -> None:
        await daemon.pods.remove_container(self.container)

    def check(self, daemon: ImageDaemon) -> None:
        daemon.pod_as_new(self.pod)


class CreateAgain(StopContainer):
    """The next container after one that has ended."""

    async def prepare(self, daemon: ImageDaemon) -> None:
        await super().prepare(daemon)
        daemon.vm(self.pod).power_off()
        await daemon.ended(self.container)

    async def call(self, daemon: ImageDaemon) -> None:
        self.container = await daemon.create_vm(self.pod, 1)

    def check(self, daemon: ImageDaemon) -> None:
        assert state(daemon, self.container) is ContainerState.CREATED

    def check_failed(self, daemon: ImageDaemon) -> None:
        assert state(daemon, self.container) is ContainerState.EXITED


class UpdateContainer(StopContainer):
    async def call(self, daemon: ImageDaemon) -> None:
        await daemon.pods.update_container(self.container, LinuxResources(memory_limit=6 << 30))

    def check(self, daemon: ImageDaemon) -> None:
        assert daemon.vm(self.pod).size.memory_mib >= 6144
        assert daemon.pods.container(self.container).spec.resources.memory_limit == 6 << 30


class StopSandbox(StopContainer):
    async def call(self, daemon: ImageDaemon) -> None:
        await daemon.pods.stop_sandbox(self.pod)

    def check(self, daemon: ImageDaemon) -> None:
        assert daemon.pods.sandbox(self.pod).state is SandboxState.NOTREADY
        assert state(daemon, self.container) is ContainerState.EXITED
        assert daemon.world.machines == []
        assert daemon.world.network.attached == {}


class RemoveSandbox(StopSandbox):
    async def call(self, daemon: ImageDaemon) -> None:
        await daemon.pods.remove_sandbox(self.pod)

    def check(self, daemon: ImageDaemon) -> None:
        assert daemon.pods.sandboxes() == []


CASES = [
    RunSandbox,
    CreateContainer,
    StartContainer,
    StopContainer,
    RemoveContainer,
    CreateAgain,
    UpdateContainer,
    StopSandbox,
    RemoveSandbox,
]


@pytest.mark.parametrize("error", [Internal("this step fails"), AgentGone("this step breaks the connection")])
@pytest.mark.parametrize("kind", CASES)
async def test_a_step_fails(kind: type[Case], error: VmruntimeError) -> None:
    async def attempt(number: int) -> bool:
        async with image_daemon() as daemon:
            case = kind()
            await case.prepare(daemon)
            if daemon.world.hypervisor.machines:
                await daemon.vm(case.pod).wait_for_line(UP)
            daemon.faults.steps.clear()
            daemon.faults.fail(EVERY_STEP, error, skip=number)
            failed = None
            try:
                await case.call(daemon)
            except VmruntimeError as told:
                failed = told
                assert "this step" in str(failed), daemon.faults.steps[number]
                await leftovers_gone(daemon)
                case.check_failed(daemon)
            reached = len(daemon.faults.steps) > number
            daemon.faults._orders.clear()
            if failed is not None:
                await case.call(daemon)
            case.check(daemon)
            return reached

    assert await each_step(attempt) >= 3


@pytest.mark.parametrize("kind", CASES)
async def test_the_daemon_is_killed(kind: type[Case]) -> None:
    """At each step in turn. The next daemon finishes or undoes; the client calls again and gets what it wanted."""

    async def attempt(number: int) -> bool:
        async with image_world() as world:
            daemon = await ImageDaemon.open(world)
            case = kind()
            await case.prepare(daemon)
            hold = daemon.faults.hold(EVERY_STEP, skip=number)
            call = asyncio.ensure_future(case.call(daemon))
            reached = asyncio.ensure_future(hold.reached.wait())
            await asyncio.wait({call, reached}, return_when=asyncio.FIRST_COMPLETED)
            was_reached = reached.done()
            reached.cancel()
            definitions = world.definitions()
            await daemon.kill()
            hold.release()
            call.cancel()
            await asyncio.wait({call})
            if not call.cancelled():
                call.exception()  # Killed, or what its end did to the call
            world.put_back(definitions)
            following = await ImageDaemon.open(world)
            consistent(following)
            try:
                await case.call(following)
            except AlreadyExists:  # it was done; kubelet finds it in its next list
                (case.pod,) = [one.id for one in following.pods.sandboxes()]
                made = sorted(following.pods.containers(), key=lambda one: one.created_at)
                case.container = made[-1].id if made else ""
            case.check(following)
            for sandbox in following.pods.sandboxes():
                await following.pods.remove_sandbox(sandbox.id)
            await following.nothing_left()
            await following.stop()
            return was_reached

    assert await each_step(attempt) >= 3


def consistent(daemon: ImageDaemon) -> None:
    """Check what a daemon shows right after its start."""
    for sandbox in daemon.pods.sandboxes():
        assert (sandbox.state is SandboxState.READY) == (sandbox.id in daemon.context.live)
        for container in daemon.context.registry.containers_of(sandbox.id, hidden=True):
            assert container.state not in (ContainerState.CREATING, ContainerState.REMOVING)
            if sandbox.state is SandboxState.NOTREADY:
                assert container.state is ContainerState.EXITED
            if container.state is ContainerState.RUNNING:
                assert daemon.vm(sandbox.id).running
    assert set(daemon.world.network.attached) <= {one.id for one in daemon.pods.sandboxes()}
    assert {one.spec.id for one in daemon.world.machines} <= set(daemon.context.live)


async def test_a_running_machine_is_taken_over(world: ImageWorld) -> None:
    daemon = await ImageDaemon.open(world)
    pod = await daemon.run_image_pod()
    container = await daemon.run_vm(pod)
    machine = daemon.vm(pod)
    await machine.wait_for_line(UP)
    before = daemon.pods.container(container)
    await daemon.kill()
    machine.say("said to nobody")
    following = await ImageDaemon.open(world)
    assert following.pods.container(container) == before
    machine.say("said to the next")
    machine.power_off()
    assert (await following.ended(container)).exit_code == 0
    assert world.log("vm0") == f"stdout F {UP}\nstdout F said to nobody\nstdout F said to the next"
    await following.pods.remove_sandbox(pod)
    await following.nothing_left()
    await following.stop()


@pytest.mark.parametrize(("end", "code"), [("power_off", 0), ("panic", 1), ("crash", 255)])
async def test_a_machine_ends_while_there_is_no_daemon(world: ImageWorld, end: str, code: int) -> None:
    daemon = await ImageDaemon.open(world)
    pod = await daemon.run_image_pod()
    container = await daemon.run_vm(pod)
    machine = daemon.vm(pod)
    await daemon.kill()
    if (ending := getattr(machine, end)()) is not None:
        await ending
    following = await ImageDaemon.open(world)
    assert (await following.ended(container)).exit_code == code
    assert following.pods.sandbox(pod).state is SandboxState.READY
    await following.run_vm(pod, 1)
    await following.pods.remove_sandbox(pod)
    await following.nothing_left()
    await following.stop()


@pytest.mark.parametrize("content", [b"", b'{"container_id": "c", "im'])
async def test_a_definition_that_cannot_be_read_costs_its_pod_only(world: ImageWorld, content: bytes) -> None:
    daemon = await ImageDaemon.open(world)
    pod, other = await daemon.run_image_pod(), await daemon.run_image_pod("other")
    container, fine = await daemon.run_vm(pod), await daemon.run_vm(other, 1)
    await daemon.kill()
    (world.paths.pod_disks(pod) / "machine.json").write_bytes(content)
    following = await ImageDaemon.open(world)
    found = following.pods.sandbox(pod)
    assert found.state is SandboxState.NOTREADY
    assert "machine.json" in found.reason
    assert state(following, container) is ContainerState.EXITED
    assert state(following, fine) is ContainerState.RUNNING
    assert [machine.spec.id for machine in world.machines] == [other]
    for one in (pod, other):
        await following.pods.remove_sandbox(one)
    await following.nothing_left()
    await following.stop()
