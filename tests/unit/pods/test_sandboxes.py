"""Sandboxes from start to removal: what is told, what is refused, what a retry gets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.support.fakes import NOW
from tests.unit.pods.bed import PATIENCE, Daemon
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.errors import Aborted, AlreadyExists, Code, FailedPrecondition, Internal, InvalidArgument, NotFound
from vmruntime.model.container import ContainerState
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import Dns, NamespaceMode, Namespaces, SandboxState
from vmruntime.network.errors import NetworkError
from vmruntime.pods import sandbox_stop
from vmruntime.pods.interface import PodEvent, PodEventKind


class Listener:
    """Takes down what is told, from its start on."""

    def __init__(self, daemon: Daemon) -> None:
        self.heard: list[PodEvent] = []
        self._task = asyncio.ensure_future(self._listen(daemon))

    async def _listen(self, daemon: Daemon) -> None:
        async for event in daemon.pods.events():
            self.heard.append(event)

    def kinds(self, subject: str) -> list[PodEventKind]:
        return [event.kind for event in self.heard if event.id == subject]

    async def close(self) -> None:
        await asyncio.sleep(0)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def test_a_sandbox_is_started(daemon: Daemon) -> None:
    listener = Listener(daemon)
    await asyncio.sleep(0)
    dns = Dns(servers=["192.0.2.53"], searches=["example"])
    pod = await daemon.run_pod(hostname="box", dns=dns, sysctls={"net.core.somaxconn": "9"}, labels={"a": "b"})
    found = daemon.pods.sandbox(pod)
    assert daemon.pods.sandboxes() == [found]
    assert (found.state, found.reason, found.kernel) == (SandboxState.READY, "", "6.1.0-fake")
    assert found.created_at > NOW
    assert found.network is not None
    assert found.network.ips == [daemon.world.network.attached[pod]]
    assert set(found.phases) == {"cni", "setup", "total"}
    machine = daemon.machine(pod)
    assert machine.nics == ["eth0"]
    setup = machine.guest.setup
    assert setup is not None
    assert (setup.sandbox_id, setup.hostname, setup.dns, setup.sysctls) == (
        pod,
        "box",
        dns,
        {"net.core.somaxconn": "9"},
    )
    assert setup.interfaces == found.network.interfaces
    assert len(setup.entropy) == 64
    await daemon.nothing_left(pods=1)
    await listener.close()
    assert listener.kinds(pod) == [PodEventKind.CREATED, PodEventKind.STARTED]
    assert all(event.sandbox == found for event in listener.heard)


async def test_a_pod_gets_the_names_and_servers_that_nobody_gave(daemon: Daemon) -> None:
    pod = await daemon.run_pod("x" * 80, namespaces=Namespaces(pid=NamespaceMode.CONTAINER))
    setup = daemon.machine(pod).guest.setup
    assert setup is not None
    assert (setup.hostname, setup.dns.servers, setup.shared_pid_namespace) == ("x" * 63, ["10.88.0.1"], False)


async def test_a_sandbox_is_stopped_and_removed(daemon: Daemon, pod: str) -> None:
    listener = Listener(daemon)
    await asyncio.sleep(0)
    container = await daemon.run(pod)
    await daemon.pods.stop_sandbox(pod)
    found = daemon.pods.sandbox(pod)
    assert (found.state, found.reason) == (SandboxState.NOTREADY, "stopped on request")
    assert daemon.pods.container(container).state is ContainerState.EXITED
    assert daemon.world.backend.running == []
    assert daemon.world.network.attached == {}
    await daemon.pods.stop_sandbox(pod)
    with pytest.raises(FailedPrecondition, match=f"{pod} is notready: stopped on request"):
        await daemon.create(pod, name="late")
    await daemon.pods.remove_sandbox(pod)
    await daemon.nothing_left()
    await daemon.pods.remove_sandbox(pod)
    await daemon.pods.stop_sandbox(pod)
    with pytest.raises(NotFound, match=pod):
        daemon.pods.sandbox(pod)
    with pytest.raises(NotFound, match=container):
        daemon.pods.container(container)
    await listener.close()
    assert listener.kinds(pod) == [PodEventKind.STOPPED, PodEventKind.DELETED]
    assert listener.heard[-1].sandbox is None


async def test_a_running_sandbox_is_removed(daemon: Daemon, pod: str) -> None:
    await daemon.run(pod)
    await daemon.create(pod, name="created")
    missing = await daemon.create(pod, "no-such-program", name="missing")
    assert daemon.pods.container(missing).state is ContainerState.CREATED
    await daemon.pods.remove_sandbox(pod)
    await daemon.nothing_left()


async def test_a_container_whose_command_is_missing_does_not_hold_up_its_sandbox(daemon: Daemon, pod: str) -> None:
    """It is created and not started: the guest knows nothing of it."""
    missing = await daemon.create(pod, "no-such-program")
    await daemon.pods.stop_sandbox(pod)
    assert daemon.pods.container(missing).state is ContainerState.EXITED


async def test_stops_and_removals_at_once(daemon: Daemon, pod: str) -> None:
    await daemon.run(pod)
    calls = [daemon.pods.stop_sandbox(pod), daemon.pods.remove_sandbox(pod)] * 3
    await asyncio.gather(*calls)
    await daemon.nothing_left()


async def test_a_name_is_taken_until_its_sandbox_is_removed(daemon: Daemon, pod: str) -> None:
    with pytest.raises(AlreadyExists, match=rf"web_n_u_0 is taken by {pod} \(ready\)") as taken:
        await daemon.run_pod()
    assert "attempt" in taken.value.remedy
    again = await daemon.run_pod(attempt=1)
    await daemon.pods.stop_sandbox(pod)
    with pytest.raises(AlreadyExists, match="notready"):
        await daemon.run_pod()
    await daemon.pods.remove_sandbox(pod)
    assert await daemon.run_pod() not in (pod, again)


async def test_the_same_name_twice_at_once(daemon: Daemon) -> None:
    calls = [daemon.run_pod() for _ in range(4)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    # Who asks while the first call is under way may be handed its sandbox, as a retry is; nobody gets a second one.
    assert {one for one in outcomes if isinstance(one, str)} == {daemon.pods.sandboxes()[0].id}
    assert {type(one) for one in outcomes} == {str, AlreadyExists}
    await daemon.nothing_left(pods=1)


async def test_a_retry_gets_the_sandbox_that_its_caller_did_not_wait_for(daemon: Daemon) -> None:
    setup = daemon.faults.hold("agent.setup")
    first = asyncio.ensure_future(daemon.run_pod())
    await setup.reached.wait()
    first.cancel()
    await asyncio.wait({first})
    assert daemon.pods.sandboxes() == []  # it is not ready yet
    retry = asyncio.ensure_future(daemon.run_pod())
    await asyncio.sleep(0)
    setup.release()
    pod = await retry
    assert [one.id for one in daemon.pods.sandboxes()] == [pod]
    with pytest.raises(AlreadyExists):  # it was handed over once
        await daemon.run_pod()
    await daemon.nothing_left(pods=1)


async def test_only_the_same_request_is_a_retry(daemon: Daemon) -> None:
    setup = daemon.faults.hold("agent.setup")
    first = asyncio.ensure_future(daemon.run_pod())
    await setup.reached.wait()
    first.cancel()
    await asyncio.wait({first})
    setup.release()
    with pytest.raises(AlreadyExists):
        await daemon.run_pod(hostname="other")
    assert await daemon.run_pod() == daemon.pods.sandboxes()[0].id


async def test_a_retry_may_give_up_too(daemon: Daemon) -> None:
    setup = daemon.faults.hold("agent.setup")
    for _ in range(3):
        impatient = asyncio.ensure_future(daemon.run_pod())
        await setup.reached.wait()
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.wait({impatient})
    setup.release()
    assert await daemon.run_pod() == daemon.pods.sandboxes()[0].id
    await daemon.nothing_left(pods=1)


async def test_a_sandbox_nobody_came_back_for_can_be_removed(daemon: Daemon) -> None:
    setup = daemon.faults.hold("agent.setup")
    first = asyncio.ensure_future(daemon.run_pod())
    await setup.reached.wait()
    first.cancel()
    await asyncio.wait({first})
    setup.release()
    async with asyncio.timeout(PATIENCE):
        while not daemon.pods.sandboxes():
            await asyncio.sleep(0.01)
    await daemon.pods.remove_sandbox(daemon.pods.sandboxes()[0].id)
    await daemon.nothing_left()


async def test_the_network_comes_up_beside_the_vm(daemon: Daemon) -> None:
    network, vm = daemon.faults.hold("network.add"), daemon.faults.hold("sandbox.start")
    starting = asyncio.ensure_future(daemon.run_pod())
    async with asyncio.timeout(PATIENCE):
        await network.reached.wait()
        await vm.reached.wait()
    network.release()
    vm.release()
    await starting


@pytest.mark.parametrize("first", ["network.add", "sandbox.start"])
async def test_when_one_fails_the_other_is_given_up(daemon: Daemon, first: str) -> None:
    other = {"network.add": "sandbox.start", "sandbox.start": "network.add"}[first]
    slow = daemon.faults.hold(other)
    daemon.faults.fail(first, NetworkError("it is broken"))
    with pytest.raises(NetworkError, match="it is broken"):
        await daemon.run_pod()
    slow.release()
    await daemon.nothing_left()


async def test_a_vm_that_ends_during_setup_is_named(daemon: Daemon) -> None:
    setup = daemon.faults.hold("agent.setup")
    starting = asyncio.ensure_future(daemon.run_pod())
    await setup.reached.wait()
    (machine,) = daemon.world.backend.machines.values()
    await machine.end("the guest's kernel panicked")
    with pytest.raises(AgentGone, match="the pod's VM ended meanwhile: the guest's kernel panicked"):
        await starting
    await daemon.nothing_left()


async def test_a_pod_that_can_never_be_is_refused_at_once(daemon: Daemon) -> None:
    daemon.faults.steps.clear()
    with pytest.raises(InvalidArgument, match="memory_limit_in_bytes"):
        await daemon.run_pod(resources=LinuxResources(memory_limit=1 << 50))
    assert {step.partition(".")[0] for step in daemon.faults.steps} <= {"store"}
    await daemon.nothing_left()


async def test_a_vm_that_ends_by_itself(daemon: Daemon, pod: str) -> None:
    running = await daemon.run(pod)
    created = await daemon.create(pod, name="created")
    gone = await daemon.run(pod, "true", name="gone")
    await daemon.ended(gone)
    await daemon.machine(pod).end("the guest's kernel panicked")
    for container in (running, created):
        found = await daemon.ended(container)
        assert (found.exit_code, found.reason) == (255, "Error")
        assert found.message == "the pod's VM ended: the guest's kernel panicked"
    assert daemon.pods.container(gone).exit_code == 0
    async with asyncio.timeout(PATIENCE):
        while daemon.pods.sandbox(pod).state is SandboxState.READY:
            await asyncio.sleep(0.01)
    assert daemon.pods.sandbox(pod).reason == "the guest's kernel panicked"
    assert daemon.context.live == {}
    assert list(daemon.world.network.attached) == [pod]  # until it is stopped
    with pytest.raises(FailedPrecondition, match="notready: the guest's kernel panicked"):
        await daemon.create(pod, name="late")
    with pytest.raises(FailedPrecondition, match="exited"):
        await daemon.pods.exec_sync(running, ["true"], 0)
    await daemon.pods.stop_container(running, 10)
    await daemon.pods.remove_container(running)
    await daemon.pods.stop_sandbox(pod)
    assert daemon.pods.sandbox(pod).reason == "the guest's kernel panicked"
    assert daemon.world.network.attached == {}


async def test_a_network_that_cannot_be_released_does_not_keep_the_vm(daemon: Daemon, pod: str) -> None:
    daemon.faults.fail("network.teardown", NetworkError("DEL failed"))
    with pytest.raises(Internal, match="DEL failed"):
        await daemon.pods.stop_sandbox(pod)
    assert daemon.world.backend.running == []
    assert daemon.pods.sandbox(pod).state is SandboxState.NOTREADY
    await daemon.pods.stop_sandbox(pod)  # kubelet's next attempt
    assert daemon.world.network.attached == {}


async def test_what_cannot_be_undone_is_tried_again(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmruntime.pods.leftovers.FIRST_SECONDS", 0.01)
    daemon.faults.fail("agent.setup", AgentError("no", Code.INTERNAL))
    daemon.faults.fail("network.teardown", NetworkError("DEL failed"), times=3)
    with pytest.raises(AgentError, match="no"):
        await daemon.run_pod()
    await daemon.run_pod()  # the name is free
    async with asyncio.timeout(PATIENCE):
        while len(await daemon.owned.ledger.all()) > 2:
            await asyncio.sleep(0.01)
    await daemon.nothing_left(pods=1)


@pytest.mark.parametrize(
    "error", [AgentGone("it does not answer"), AgentError("it is confused", Code.INTERNAL)], ids=["gone", "refuses"]
)
async def test_a_guest_that_answers_nothing_is_stopped_all_the_same(
    daemon: Daemon, pod: str, error: AgentError
) -> None:
    container = await daemon.run(pod)
    for call in ("signal", "shutdown", "delete"):
        daemon.faults.fail(f"agent.{call}", error, times=-1)
    await daemon.pods.stop_sandbox(pod)
    assert daemon.world.backend.running == []
    assert daemon.pods.container(container).state is ContainerState.EXITED
    await daemon.pods.remove_sandbox(pod)
    await daemon.nothing_left()


async def test_a_guest_that_hangs_is_stopped_soon(daemon: Daemon, pod: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """kubelet waits two minutes for a call; a frozen guest must not take that long."""
    monkeypatch.setattr(sandbox_stop, "CONTAINER_GRACE", 0.05)
    monkeypatch.setattr(sandbox_stop, "CONTAINER_SLACK", 0.05)
    await daemon.run(pod)
    frozen = daemon.faults.hold("agent.signal")
    async with asyncio.timeout(PATIENCE):
        await daemon.pods.stop_sandbox(pod)
    assert frozen.reached.is_set()
    assert daemon.world.backend.running == []
    frozen.release()


async def test_a_vm_that_cannot_be_shut_down_is_released(daemon: Daemon, pod: str) -> None:
    daemon.faults.fail("sandbox.shut_down", Internal("QEMU cannot be ended"))
    with pytest.raises(Internal, match="QEMU cannot be ended"):
        await daemon.pods.stop_sandbox(pod)
    await daemon.pods.stop_sandbox(pod)
    assert daemon.world.backend.running == []


async def test_containers_are_given_a_moment_to_end(daemon: Daemon, pod: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_stop, "CONTAINER_GRACE", PATIENCE)
    container = await daemon.run(pod, "sh", "-c", "trap 'exit 7' TERM; sleep 1000")
    await _trapped(daemon, pod, container)
    await daemon.pods.stop_sandbox(pod)
    assert daemon.pods.container(container).exit_code == 7


async def _trapped(daemon: Daemon, pod: str, container: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while not daemon.machine(pod).guest.containers[container].process.handlers:
            await asyncio.sleep(0.01)


async def test_the_size_of_a_pod_changes(daemon: Daemon, pod: str) -> None:
    await daemon.pods.update_sandbox(
        pod, None, LinuxResources(memory_limit=2 << 30, cpu_quota=300_000, cpu_period=100_000)
    )
    size = daemon.machine(pod).size
    assert size is not None
    assert (size.vcpus, size.memory_mib > 2048) == (3, True)
    resources = daemon.pods.sandbox(pod).spec.resources
    assert resources is not None
    assert resources.cpu_quota == 300_000
    daemon.faults.fail("sandbox.resize", Internal("no room"))
    with pytest.raises(Internal, match="no room"):
        await daemon.pods.update_sandbox(pod, None, LinuxResources(memory_limit=3 << 30))
    assert daemon.pods.sandbox(pod).spec.resources == resources
    await daemon.pods.stop_sandbox(pod)
    with pytest.raises(FailedPrecondition, match="notready"):
        await daemon.pods.update_sandbox(pod, None, None)


async def test_usage_of_pods(daemon: Daemon, pod: str) -> None:
    other = await daemon.run_pod("other")
    container = await daemon.run(pod)
    used = {one.id: one for one in await daemon.pods.sandbox_usage([pod, other])}
    assert (used[pod].host.memory_usage, [one.id for one in used[pod].guest.containers]) == (2, [container])
    daemon.faults.fail("agent.stats", AgentGone("it went"))
    assert len(await daemon.pods.sandbox_usage([pod, other])) == 1
    await daemon.pods.stop_sandbox(other)
    assert [one.id for one in await daemon.pods.sandbox_usage([pod, other])] == [pod]


async def test_ports_of_a_pod(daemon: Daemon, pod: str) -> None:
    daemon.machine(pod).guest.echo_ports.add(80)
    async with daemon.pods.ports(pod) as ports:
        async with ports.connect(80) as connection:
            await connection.write(b"hello")
            await connection.close_write()
            assert b"".join([data async for data in connection.read()]) == b"hello"
        with pytest.raises(AgentError, match="refused"):
            async with ports.connect(81):
                pass
    await daemon.pods.stop_sandbox(pod)
    with pytest.raises(FailedPrecondition, match="notready"):
        async with daemon.pods.ports(pod):
            pass
    with pytest.raises(NotFound):
        async with daemon.pods.ports("none"):
            pass


async def test_a_start_that_cannot_be_undone_leaves_no_name_taken(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a release raises; what remains is released in the background."""
    monkeypatch.setattr("vmruntime.pods.leftovers.FIRST_SECONDS", 0.01)
    daemon.faults.fail("agent.setup", AgentError("no", Code.INTERNAL))
    daemon.faults.fail("sandbox.release", ValueError("a defect"))
    with pytest.raises(AgentError, match="no"):
        await daemon.run_pod()
    assert daemon.context.registry.sandboxes(hidden=True) == []
    async with asyncio.timeout(PATIENCE):
        while await daemon.owned.ledger.all():
            await asyncio.sleep(0.01)


async def test_a_listener_that_is_too_slow_is_cut_off(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmruntime.pods.broadcast.BACKLOG", 2)
    events = daemon.pods.events()
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    for number in range(3):
        await daemon.run_pod(f"pod{number}")
    assert (await first).kind is PodEventKind.CREATED
    with pytest.raises(Aborted, match="too far behind"):
        await asyncio.wait_for(drain(events), PATIENCE)


async def drain(events: AsyncIterator[PodEvent]) -> None:
    async for _ in events:
        pass
