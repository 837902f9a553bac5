"""What a daemon makes of what it finds: in the store, in the ledger, in the guests that went on without it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.unit.pods.bed import PATIENCE, Daemon, World, sandbox_spec
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.interface import GuestContainer, PidMode
from vmruntime.aio.faults import Faults
from vmruntime.errors import Code, FailedPrecondition, Internal
from vmruntime.hypervisor.errors import VmHeld
from vmruntime.model.container import Container, ContainerState
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Sandbox, SandboxKind, SandboxState
from vmruntime.network.errors import NetworkError
from vmruntime.pods import recovery
from vmruntime.pods.recovery import recover
from vmruntime.store.records import PodRecords

Restart = Callable[..., Awaitable[Daemon]]


class Node:
    """A world and the daemon that runs in it now."""

    def __init__(self, world: World, daemon: Daemon) -> None:
        self.world = world
        self.daemon = daemon

    async def restart(self, faults: Faults | None = None) -> Daemon:
        """Kill the daemon and start the next one."""
        await self.daemon.kill()
        return await self.start(faults)

    async def start(self, faults: Faults | None = None) -> Daemon:
        self.daemon = await Daemon.start(self.world, faults)
        return self.daemon

    async def found(self, *records: Sandbox | Container) -> Daemon:
        """Have the next daemon find these records, whatever the last one wrote."""
        store = PodRecords(self.daemon.database)
        for record in records:
            await (store.put_sandbox(record) if isinstance(record, Sandbox) else store.put_container(record))
        return await self.restart()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    world = World(tmp_path)
    node = Node(world, await Daemon.start(world))
    yield node
    for sandbox in node.daemon.pods.sandboxes():
        await node.daemon.pods.remove_sandbox(sandbox.id)
    await node.daemon.nothing_left()
    await node.daemon.stop()
    for machine in world.backend.machines.values():
        await machine.end("the test is over")


async def test_a_pod_is_taken_over(node: Node) -> None:
    before = node.daemon
    pod = await before.run_pod()
    container = await before.run(pod, "sh", "-c", "echo one; cat", stdin=True)
    created = await before.create(pod, name="created")
    records = before.pods.sandbox(pod), before.pods.container(created)
    daemon = await node.restart()
    assert (daemon.pods.sandbox(pod), daemon.pods.container(created)) == records
    stdin = daemon.machine(pod).guest.containers[container].process.stdin
    await stdin.put(b"two\n")
    await stdin.put(b"")
    assert (await daemon.ended(container)).exit_code == 0
    assert node.world.log() == "stdout F one\nstdout F two"
    assert (await daemon.pods.usage([container])) == []
    await daemon.pods.start_container(created)
    assert (await daemon.pods.exec_sync(created, ["echo", "hello"], 0)).stdout == b"hello\n"


async def test_a_daemon_that_is_stopped_leaves_its_pods_alone(node: Node) -> None:
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    await node.daemon.stop()
    assert node.world.backend.running == [pod]
    daemon = await node.start()
    assert daemon.pods.container(container).state is ContainerState.RUNNING


async def test_what_ended_meanwhile_is_told_as_it_was(node: Node) -> None:
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    killed = await node.daemon.run(pod, name="killed")
    await node.daemon.stop()
    guest = node.world.backend.machines[pod].guest
    guest.containers[container].exit(9)
    guest.containers[killed].exit(137, oom_killed=True)
    daemon = await node.start()
    found, oom = daemon.pods.container(container), daemon.pods.container(killed)
    assert (found.state, found.exit_code, found.reason) == (ContainerState.EXITED, 9, "Error")
    assert found.started_at < found.finished_at < node.world.clock.now_ns()
    assert (oom.exit_code, oom.reason) == (137, "OOMKilled")


async def test_what_the_guest_does_not_know_any_more_is_lost(node: Node) -> None:
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    await node.daemon.kill()
    node.world.backend.machines[pod].guest.containers.clear()
    daemon = await node.start()
    found = daemon.pods.container(container)
    assert (found.state, found.exit_code) == (ContainerState.EXITED, 255)
    assert "end was not seen" in found.message


async def test_a_container_whose_command_is_missing_is_no_loss(node: Node) -> None:
    pod = await node.daemon.run_pod()
    container = await node.daemon.create(pod, "no-such-program")
    daemon = await node.restart()
    assert daemon.pods.container(container).state is ContainerState.CREATED
    with pytest.raises(FailedPrecondition, match="not found in"):
        await daemon.pods.start_container(container)
    assert daemon.pods.container(container).exit_code == 127


async def test_what_only_the_guest_knows_is_deleted(node: Node) -> None:
    pod = await node.daemon.run_pod()
    machine = node.daemon.machine(pod)
    machine.layers.add("f" * 32)
    stranger = GuestContainer(
        id="stranger",
        oci_spec=b'{"process": {"args": ["true"]}}',
        layer_serials=["f" * 32],
        readonly_rootfs=False,
        user="",
        groups=[],
        image_groups=False,
        pid_mode=PidMode.CONTAINER,
    )
    machine.guest.create(stranger)
    daemon = await node.restart()
    async with asyncio.timeout(PATIENCE):
        while machine.guest.containers or machine.layers:
            await asyncio.sleep(0.01)
    daemon.pod_as_new(pod)


async def test_containers_that_a_guest_invents_hold_nothing_up(node: Node) -> None:
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    state = node.daemon.machine(pod).guest.containers[container].state
    faults = Faults()
    faults.lie("agent.containers", [state, *(replace(state, id=f"invented{number}") for number in range(1000))])
    delete = faults.hold("agent.delete")
    daemon = await node.restart(faults)
    assert daemon.pods.sandbox(pod).state is SandboxState.READY
    assert daemon.pods.container(container).state is ContainerState.RUNNING
    async with asyncio.timeout(PATIENCE):
        await delete.reached.wait()
        delete.release()
        while faults.steps.count("sandbox.release_layers done") < recovery.MOST_STRANGERS:
            await asyncio.sleep(0.01)
    assert faults.steps.count("agent.delete") == recovery.MOST_STRANGERS


@pytest.mark.parametrize("step", ["sandbox.adopt", "agent.containers", "agent.delete"])
async def test_a_guest_that_does_not_answer_is_given_up(node: Node, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    pod, other = await node.daemon.run_pod(), await node.daemon.run_pod("other")
    container = await node.daemon.run(pod)
    record = replace(node.daemon.pods.container(container), state=ContainerState.REMOVING)
    await PodRecords(node.daemon.database).put_container(record)
    monkeypatch.setattr(recovery, "ADOPT_SECONDS", 0.5)
    monkeypatch.setattr(recovery, "AT_ONCE", 1)  # so that it is known whose step comes first
    faults = Faults()
    hold = faults.hold(step)
    daemon = await node.restart(faults)
    assert hold.reached.is_set()
    found = {one.id: one for one in daemon.pods.sandboxes()}
    assert (found[pod].state, found[pod].reason) == (SandboxState.NOTREADY, "it could not be taken over within 0.5 s")
    assert found[other].state is SandboxState.READY
    assert node.world.backend.running == [other]


@pytest.mark.parametrize("step", ["sandbox.adopt", "agent.containers"])
async def test_a_defect_costs_one_sandbox_and_not_the_start(node: Node, step: str) -> None:
    pods = {await node.daemon.run_pod(), await node.daemon.run_pod("other")}
    faults = Faults()
    faults.fail(step, ValueError("a defect"))
    daemon = await node.restart(faults)
    found = {one.id: one for one in daemon.pods.sandboxes()}
    (given_up,) = [one.id for one in found.values() if one.state is SandboxState.NOTREADY]
    assert found[given_up].reason == "it could not be taken over: ValueError('a defect')"
    assert set(node.world.backend.running) == pods - {given_up}


async def test_a_pod_of_a_kind_that_is_switched_off_does_not_stop_the_daemon(node: Node) -> None:
    pod = await node.daemon.run_pod()
    backends = node.daemon.context.backends
    backends[SandboxKind.HOST] = backends.pop(SandboxKind.CONTAINER)
    live = node.daemon.context.live.pop(pod)
    await live.scope.close()
    await live.running.close()
    await recover(node.daemon.context)
    assert "runs no pods of the kind container" in node.daemon.pods.sandbox(pod).reason
    with pytest.raises(FailedPrecondition, match="runs no pods of the kind"):
        await node.daemon.run_pod("another")
    await node.daemon.pods.remove_sandbox(pod)
    assert not node.daemon.pods.sandboxes()


async def test_a_vm_that_ended_meanwhile(node: Node) -> None:
    pod = await node.daemon.run_pod()
    container, created = await node.daemon.run(pod), await node.daemon.create(pod, name="created")
    other = await node.daemon.run_pod("other")
    await node.daemon.kill()
    await node.world.backend.machines[pod].end("the power went")
    daemon = await node.start()
    found = daemon.pods.sandbox(pod)
    assert (found.state, found.reason) == (SandboxState.NOTREADY, "it ended while no daemon was running")
    for one in (container, created):
        ended = daemon.pods.container(one)
        assert (ended.state, ended.exit_code) == (ContainerState.EXITED, 255)
        assert ended.message == "the pod's VM ended: it ended while no daemon was running"
    assert set(node.world.network.attached) == {pod, other}  # until it is stopped
    assert {one.kind for one in await daemon.owned.ledger.owned_by(pod)} == {ResourceKind.NETWORK}
    assert daemon.pods.sandbox(other).state is SandboxState.READY


async def test_a_vm_that_cannot_be_taken_over_is_ended(node: Node) -> None:
    pod = await node.daemon.run_pod()
    await node.daemon.run(pod)
    faults = Faults()
    faults.fail("sandbox.adopt", Internal("its monitor says nothing"))
    daemon = await node.restart(faults)
    assert daemon.pods.sandbox(pod).reason == "its monitor says nothing"
    assert node.world.backend.running == []


async def test_a_guest_that_is_busy_is_asked_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "STATES_SECONDS", 0.01)
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    faults = Faults()
    faults.fail("agent.containers", AgentGone("not yet"), times=2)
    daemon = await node.restart(faults)
    assert daemon.pods.container(container).state is ContainerState.RUNNING
    daemon.machine(pod).guest.containers[container].exit(4)
    assert (await daemon.ended(container)).exit_code == 4


async def test_a_guest_that_never_tells_its_containers_is_of_no_use(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "STATES_SECONDS", 0.01)
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    faults = Faults()
    faults.fail("agent.containers", AgentError("confused", Code.INTERNAL), times=-1)
    daemon = await node.restart(faults)
    assert (daemon.pods.sandbox(pod).state, daemon.pods.sandbox(pod).reason) == (SandboxState.NOTREADY, "confused")
    assert daemon.pods.container(container).state is ContainerState.EXITED
    assert node.world.backend.running == []


async def test_a_log_that_cannot_be_written_any_more_does_not_stop_its_container(node: Node) -> None:
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod, "sh", "-c", "echo one; cat", stdin=True)
    other = await node.daemon.run(pod, name="other")
    await node.daemon.kill()
    log = Path(node.daemon.pods.container(container).spec.log_path)
    log.unlink()
    log.mkdir()
    daemon = await node.start()
    stdin = daemon.machine(pod).guest.containers[container].process.stdin
    for _ in range(40):
        await stdin.put(b"x" * 65536)  # more than the guest keeps
    await stdin.put(b"")
    assert (await daemon.ended(container)).exit_code == 0
    await daemon.pods.stop_container(other, 0)


@pytest.mark.parametrize("state", [SandboxState.CREATING, SandboxState.REMOVING])
async def test_a_sandbox_half_made_or_half_removed_goes(node: Node, state: SandboxState) -> None:
    pod = await node.daemon.run_pod()
    await node.daemon.run(pod)
    daemon = await node.found(replace(node.daemon.pods.sandbox(pod), state=state))
    await daemon.nothing_left()
    await daemon.run_pod()  # its name is free


async def test_a_half_made_sandbox_whose_network_cannot_be_released(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows its id, so nobody will ask again: the daemon goes on trying."""
    monkeypatch.setattr("vmruntime.pods.leftovers.FIRST_SECONDS", 0.01)
    pod = await node.daemon.run_pod()
    await PodRecords(node.daemon.database).put_sandbox(
        replace(node.daemon.pods.sandbox(pod), state=SandboxState.CREATING)
    )
    faults = Faults()
    faults.fail("network.teardown", NetworkError("DEL failed"), times=3)
    daemon = await node.restart(faults)
    assert daemon.pods.sandboxes() == []
    async with asyncio.timeout(PATIENCE):
        while await daemon.owned.ledger.all():
            await asyncio.sleep(0.01)
    assert node.world.network.attached == {}


async def test_a_half_removed_sandbox_whose_network_cannot_be_released(node: Node) -> None:
    """kubelet asks again, by its id."""
    pod = await node.daemon.run_pod()
    await PodRecords(node.daemon.database).put_sandbox(
        replace(node.daemon.pods.sandbox(pod), state=SandboxState.REMOVING)
    )
    faults = Faults()
    faults.fail("network.teardown", NetworkError("DEL failed"))
    daemon = await node.restart(faults)
    assert daemon.context.registry.sandbox(pod).state is SandboxState.REMOVING
    await daemon.pods.remove_sandbox(pod)
    await daemon.nothing_left()


async def test_a_sandbox_whose_stop_was_cut_short(node: Node) -> None:
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    stopped = replace(node.daemon.pods.sandbox(pod), state=SandboxState.NOTREADY, reason="stopped on request")
    daemon = await node.found(stopped)
    assert daemon.pods.sandbox(pod) == stopped
    assert daemon.pods.container(container).state is ContainerState.EXITED
    assert node.world.backend.running == []


@pytest.mark.parametrize("state", [ContainerState.CREATING, ContainerState.REMOVING])
@pytest.mark.parametrize("alive", [True, False])
async def test_a_container_half_made_or_half_removed_goes(node: Node, state: ContainerState, alive: bool) -> None:
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    record = replace(node.daemon.pods.container(container), state=state)
    if not alive:
        await node.world.backend.machines[pod].end("the power went")
        await node.daemon.ended(container)
    daemon = await node.found(record)
    assert daemon.context.registry.containers(hidden=True) == []
    if alive:
        daemon.pod_as_new(pod)
        await daemon.create(pod)  # its name is free


@pytest.mark.parametrize(
    ("written", "is_found"),
    [
        (ContainerState.CREATED, ContainerState.RUNNING),
        (ContainerState.RUNNING, ContainerState.RUNNING),
        (ContainerState.EXITED, ContainerState.EXITED),
    ],
)
async def test_a_container_that_runs(node: Node, written: ContainerState, is_found: ContainerState) -> None:
    """Its start may not have been written down; its end, once written, is final."""
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    record = replace(node.daemon.pods.container(container), state=written, started_at=0)
    daemon = await node.found(record)
    found = daemon.pods.container(container)
    assert found.state is is_found
    if written is ContainerState.CREATED:
        assert found.started_at > 0


async def test_one_sandbox_that_fails_does_not_stop_the_others(node: Node) -> None:
    pods = [await node.daemon.run_pod(f"pod{number}") for number in range(20)]
    containers = {pod: await node.daemon.run(pod) for pod in pods}
    faults = Faults()
    faults.fail("store.write", Internal("the disk is full"), skip=1)
    for number in (3, 4):
        faults.fail("sandbox.adopt", Internal("no"), skip=number)
    daemon = await node.restart(faults)
    ready = [one.id for one in daemon.pods.sandboxes() if one.state is SandboxState.READY]
    assert len(ready) >= 17
    for pod in ready:
        if pod in daemon.context.live:
            await daemon.pods.stop_container(containers[pod], 0)


async def test_what_nobody_owns_is_released(node: Node) -> None:
    pod = await node.daemon.run_pod()
    ledger = node.daemon.owned.ledger
    await ledger.record(Resource(owner="nobody", kind=ResourceKind.NETWORK, key="nobody"))
    directory = node.world.paths.root / "left"
    await node.daemon.owned.directory("nobody", directory)
    node.world.network.attached["nobody"] = "10.88.9.9"
    daemon = await node.restart()
    assert {one.owner for one in await daemon.owned.ledger.all()} == {pod}
    assert list(node.world.network.attached) == [pod]
    assert not directory.exists()


async def test_a_retry_after_a_restart_is_no_retry(node: Node) -> None:
    """The next daemon does not know who was told; kubelet lists the pods and finds the one it made."""
    setup = node.daemon.faults.hold("agent.setup")
    first = asyncio.ensure_future(node.daemon.run_pod())
    await setup.reached.wait()
    setup.release()
    pod = await first
    daemon = await node.restart()
    with pytest.raises(Exception, match=f"taken by {pod}"):
        await daemon.pods.run_sandbox(sandbox_spec())


async def test_a_guest_that_does_not_run_is_taken_over_when_it_does(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writes wait for room on the disk: the pod is not gone, and whoever wants something of it hears why."""
    monkeypatch.setattr(recovery, "HELD_SECONDS", 0.02)
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod)
    machine = node.daemon.machine(pod)
    machine.held = "the host has no room"
    faults = Faults()
    faults.fail("sandbox.adopt", VmHeld(machine.held), times=3)
    daemon = await node.restart(faults)
    assert daemon.pods.sandbox(pod).state is SandboxState.READY
    assert daemon.pods.container(container).state is ContainerState.RUNNING
    with pytest.raises(VmHeld, match="the pod's VM is held: the host has no room"):
        await daemon.pods.exec_sync(container, ["true"], 5.0)
    machine.held = ""
    assert await runs_again(daemon, container)
    await daemon.pods.stop_container(container, 0.05)
    assert (await daemon.ended(container)).state is ContainerState.EXITED


async def test_a_guest_that_stops_while_it_is_taken_over(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "HELD_SECONDS", 0.02)
    monkeypatch.setattr(recovery, "ADOPT_SECONDS", 0.2)
    pod = await node.daemon.run_pod()
    container = await node.daemon.run(pod, "sh", "-c", "sleep 1000")
    machine = node.daemon.machine(pod)
    machine.held = "the host has no room"
    machine.guest.faults.delay("agent.containers", 60)
    daemon = await node.restart()
    assert daemon.pods.sandbox(pod).state is SandboxState.READY
    machine.held = ""
    assert await runs_again(daemon, container)


async def runs_again(daemon: Daemon, container: str) -> bool:
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(VmHeld):
                return (await daemon.pods.exec_sync(container, ["true"], 5.0)).exit_code == 0
            await asyncio.sleep(0.01)


async def test_a_pod_that_is_stopped_while_its_guest_does_not_run(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "HELD_SECONDS", 0.05)
    pod = await node.daemon.run_pod()
    await node.daemon.run(pod, "sh", "-c", "sleep 1000")
    faults = Faults()
    faults.fail("sandbox.adopt", VmHeld("the host has no room"), times=-1)
    daemon = await node.restart(faults)
    await daemon.pods.stop_sandbox(pod)
    assert daemon.pods.sandbox(pod).state is SandboxState.NOTREADY
    await daemon.pods.remove_sandbox(pod)
    await asyncio.sleep(0.1)
    await daemon.nothing_left()
