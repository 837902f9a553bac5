"""Containers from creation to removal: what they run, how they end, who may have their name."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from tests.support.fakes import make_image
from tests.unit.pods.bed import PATIENCE, TRAP, Daemon, state, until_ready
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.interface import GuestPhase
from vmruntime.errors import (
    AlreadyExists,
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
)
from vmruntime.model.container import Container, ContainerEdits, ContainerState, ContainerUser
from vmruntime.pods import container_stop


async def test_a_container_is_created_started_and_ends(daemon: Daemon, pod: str) -> None:
    container = await daemon.create(pod, "sh", "-c", "echo hello; echo oops >&2; exit 3", labels={"a": "b"})
    created = daemon.pods.container(container)
    assert (created.state, created.sandbox_id, created.user) == (
        ContainerState.CREATED,
        pod,
        ContainerUser(uid=0, gid=0, groups=[0]),
    )
    assert created.pid > 0
    assert created.image_ref.startswith("docker.io/library/busybox@sha256:")
    assert daemon.world.images.touched == [created.image_id]
    assert daemon.pods.containers() == [created]
    await daemon.pods.start_container(container)
    ended = await daemon.ended(container)
    assert (ended.exit_code, ended.reason, ended.message, ended.pid) == (3, "Error", "", 0)
    assert created.created_at < ended.started_at < ended.finished_at
    assert daemon.world.log() == "stdout F hello\nstderr F oops"
    await daemon.pods.remove_container(container)
    daemon.pod_as_new(pod)
    with pytest.raises(NotFound, match=container):
        daemon.pods.container(container)


async def test_a_container_that_succeeds_has_completed(daemon: Daemon, pod: str) -> None:
    ended = await daemon.ended(await daemon.run(pod, "true"))
    assert (ended.exit_code, ended.reason) == (0, "Completed")


async def test_a_container_that_the_kernel_killed(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    daemon.machine(pod).guest.containers[container].exit(137, oom_killed=True)
    ended = await daemon.ended(container)
    assert (ended.exit_code, ended.reason) == (137, "OOMKilled")


async def test_the_stop_signal_comes_first(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod, "sh", "-c", TRAP)
    await until_ready(daemon)
    await daemon.pods.stop_container(container, PATIENCE)
    assert daemon.pods.container(container).exit_code == 7


async def test_the_stop_signal_may_be_another(daemon: Daemon, pod: str) -> None:
    daemon.world.images.add(make_image("quitter", "a", stop_signal="SIGINT"))
    reference = "docker.io/library/quitter:1"
    for number, given in enumerate(["", "SIGHUP"]):
        name = f"app{number}"
        script = TRAP.replace("TERM", given.removeprefix("SIG") or "INT")
        container = await daemon.run(pod, "sh", "-c", script, name=name, image=reference, stop_signal=given)
        await until_ready(daemon, name)
        await daemon.pods.stop_container(container, PATIENCE)
        assert daemon.pods.container(container).exit_code == 7


async def test_sigkill_comes_when_the_grace_is_over(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    await daemon.pods.stop_container(container, 0.05)
    assert daemon.pods.container(container).exit_code == 137


async def test_without_grace_sigkill_comes_at_once(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod, "sh", "-c", TRAP)
    await until_ready(daemon)
    await daemon.pods.stop_container(container, 0)
    assert daemon.pods.container(container).exit_code == 137


async def test_stopping_what_does_not_run_is_success(daemon: Daemon, pod: str) -> None:
    await daemon.pods.stop_container("unknown", 1)
    container = await daemon.create(pod)
    await daemon.pods.stop_container(container, PATIENCE)  # SIGKILL at once: nothing runs that could clean up
    assert (state(daemon, container), daemon.pods.container(container).exit_code) == (ContainerState.EXITED, 137)
    await daemon.pods.stop_container(container, 1)
    with pytest.raises(FailedPrecondition, match="exited; only a created one"):
        await daemon.pods.start_container(container)


async def test_stopping_what_cannot_be_started_is_success(daemon: Daemon, pod: str) -> None:
    """Its command is missing, so the guest has no such container."""
    container = await daemon.create(pod, "no-such-program")
    await daemon.pods.stop_container(container, 1)
    assert state(daemon, container) is ContainerState.EXITED
    assert daemon.pods.container(container).exit_code == 127


async def test_stops_at_once(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    await asyncio.gather(*(daemon.pods.stop_container(container, 0.05) for _ in range(4)))
    assert daemon.pods.container(container).exit_code == 137


async def test_a_container_that_survives_sigkill(daemon: Daemon, pod: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_stop, "KILL_SECONDS", 0.05)
    container = await daemon.run(pod)
    monkeypatch.setattr(daemon.machine(pod).guest, "signal", lambda container_id, signal: None)
    with pytest.raises(DeadlineExceeded, match=rf"{container} did not end within 0\.05 s of SIGKILL"):
        await daemon.pods.stop_container(container, 0)
    assert state(daemon, container) is ContainerState.RUNNING


async def test_a_container_whose_end_comes_with_its_vm(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    stopping = asyncio.ensure_future(daemon.pods.stop_container(container, PATIENCE))
    async with asyncio.timeout(PATIENCE):
        while "agent.signal" not in daemon.faults.steps:
            await asyncio.sleep(0.01)
    await daemon.machine(pod).end("the power went")
    async with asyncio.timeout(PATIENCE):
        await stopping
    assert daemon.pods.container(container).exit_code == 255


async def test_removal_kills(daemon: Daemon, pod: str) -> None:
    running, created = await daemon.run(pod), await daemon.create(pod, name="created")
    missing = await daemon.create(pod, "no-such-program", name="missing")
    for container in (running, created, missing):
        await daemon.pods.remove_container(container)
        await daemon.pods.remove_container(container)
    await daemon.pods.remove_container("unknown")
    daemon.pod_as_new(pod)


async def test_removals_at_once(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    await asyncio.gather(*(daemon.pods.remove_container(container) for _ in range(4)))
    daemon.pod_as_new(pod)


async def test_a_removal_goes_on_without_its_caller(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    delete = daemon.faults.hold("agent.delete")
    removing = asyncio.ensure_future(daemon.pods.remove_container(container))
    await delete.reached.wait()
    removing.cancel()
    await asyncio.wait({removing})
    assert state(daemon, container) is ContainerState.REMOVING
    delete.release()
    await daemon.pods.remove_container(container)
    daemon.pod_as_new(pod)


async def test_a_removal_that_failed_is_finished_by_the_next(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    daemon.faults.fail("agent.delete", AgentError("busy", Code.INTERNAL))
    with pytest.raises(AgentError, match="busy"):
        await daemon.pods.remove_container(container)
    with pytest.raises(FailedPrecondition, match="removing"):
        await daemon.pods.exec_sync(container, ["true"], 0)
    await daemon.pods.remove_container(container)
    daemon.pod_as_new(pod)


async def test_a_name_is_taken_until_its_container_is_removed(daemon: Daemon, pod: str) -> None:
    first = await daemon.run(pod, "true")
    await daemon.ended(first)
    with pytest.raises(AlreadyExists, match=rf"app \(attempt 0\) is taken in its sandbox by {first} \(exited\)"):
        await daemon.create(pod)
    assert await daemon.create(pod, attempt=1) != first
    other = await daemon.run_pod("other")
    await daemon.create(other)
    await daemon.pods.remove_container(first)
    await daemon.create(pod)


async def test_a_retry_gets_the_container_that_its_caller_did_not_wait_for(daemon: Daemon, pod: str) -> None:
    create = daemon.faults.hold("agent.create")
    first = asyncio.ensure_future(daemon.create(pod))
    await create.reached.wait()
    first.cancel()
    await asyncio.wait({first})
    assert daemon.pods.containers() == []  # it is not created yet
    retry = asyncio.ensure_future(daemon.create(pod))
    await asyncio.sleep(0)
    create.release()
    container = await retry
    assert [one.id for one in daemon.pods.containers()] == [container]
    with pytest.raises(AlreadyExists):
        await daemon.create(pod)
    await daemon.nothing_left(pods=1)


async def test_only_the_same_request_is_a_retry(daemon: Daemon, pod: str) -> None:
    create = daemon.faults.hold("agent.create")
    first = asyncio.ensure_future(daemon.create(pod))
    await create.reached.wait()
    first.cancel()
    await asyncio.wait({first})
    create.release()
    with pytest.raises(AlreadyExists):
        await daemon.create(pod, "true")
    assert await daemon.create(pod) == daemon.pods.containers()[0].id


async def test_what_was_used_is_not_handed_over(daemon: Daemon, pod: str) -> None:
    """A client that found the container in a list and started it needs no retry any more."""
    create = daemon.faults.hold("agent.create")
    first = asyncio.ensure_future(daemon.create(pod))
    await create.reached.wait()
    first.cancel()
    await asyncio.wait({first})
    create.release()
    async with asyncio.timeout(PATIENCE):
        while not daemon.pods.containers():
            await asyncio.sleep(0.01)
    await daemon.pods.start_container(daemon.pods.containers()[0].id)
    with pytest.raises(AlreadyExists, match="running"):
        await daemon.create(pod)


async def test_a_guest_cannot_end_what_is_not_its_own(daemon: Daemon, pod: str) -> None:
    other = await daemon.run_pod("other")
    mine, theirs = await daemon.run(pod), await daemon.run(other)
    guest = daemon.machine(other).guest
    lie = guest.containers[theirs].state
    for told in (mine, "nobody's"):
        guest.publish(replace(lie, id=told, phase=GuestPhase.EXITED, exit_code=1))
    guest.containers[theirs].exit(3)
    assert (await daemon.ended(theirs)).exit_code == 3
    assert state(daemon, mine) is ContainerState.RUNNING


async def test_a_guests_clock_is_not_believed(daemon: Daemon, pod: str) -> None:
    found: list[Container] = []
    for number, told in enumerate((1, 1 << 62)):
        container = await daemon.run(pod, name=f"c{number}")
        guest = daemon.machine(pod).guest
        guest.containers[container].output.close()
        guest.publish(replace(guest.containers[container].state, phase=GuestPhase.EXITED, exited_at=told))
        found.append(await daemon.ended(container))
    now = daemon.world.clock.now_ns()
    assert all(one.started_at <= one.finished_at <= now for one in found)


async def test_events_are_heard_again_after_they_broke(daemon: Daemon) -> None:
    daemon.faults.fail("agent.events", AgentGone("broken"), times=2)
    container = await daemon.run(await daemon.run_pod(), "sh", "-c", "exit 5")
    assert (await daemon.ended(container)).exit_code == 5


@pytest.mark.parametrize("error", [OSError(16, "busy"), ValueError("a defect")])
async def test_a_creation_that_cannot_be_undone_leaves_no_name_taken(
    daemon: Daemon, pod: str, error: Exception
) -> None:
    daemon.faults.fail("agent.create", AgentError("no", Code.INTERNAL))
    daemon.faults.fail("sandbox.withdraw_volumes", error)
    with pytest.raises(AgentError, match="no"):
        await daemon.create(pod)
    assert daemon.context.registry.containers(hidden=True) == []
    await daemon.create(pod)


async def test_a_creation_whose_undo_cannot_be_written_down_is_undone_later(
    daemon: Daemon, pod: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmruntime.pods.monitor.RECORD_SECONDS", 0.01)

    async def full() -> None:
        daemon.faults.fail("store.write", Internal("the disk is full"), times=2)
        raise AgentError("no", Code.INTERNAL)

    daemon.faults.run("agent.create", full)
    with pytest.raises(AgentError, match="no"):
        await daemon.create(pod)
    async with asyncio.timeout(PATIENCE):
        while daemon.context.registry.containers(hidden=True):
            await asyncio.sleep(0.01)
    await daemon.create(pod)


async def test_volumes_that_are_not_let_go_of_delay_a_removal_once(daemon: Daemon, pod: str) -> None:
    container = await daemon.create(pod)
    daemon.faults.fail("sandbox.withdraw_volumes", FailedPrecondition("the mount is busy"), times=-1)
    with pytest.raises(FailedPrecondition, match="busy"):
        await daemon.pods.remove_container(container)
    await daemon.pods.remove_container(container)
    assert daemon.context.registry.containers(hidden=True) == []


async def test_an_image_is_looked_up_when_everything_else_is_known(
    daemon: Daemon, pod: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed while CDI files are read, it is missing at once and not in the middle of the creation."""

    async def slow(*_: object) -> ContainerEdits:
        daemon.world.images.images.clear()
        return ContainerEdits()

    monkeypatch.setattr("vmruntime.pods.container_create.cdi_edits", slow)
    with pytest.raises(NotFound, match="is not on this host"):
        await daemon.create(pod)


async def test_a_creation_that_is_broken_off_before_it_began_lets_its_name_go(daemon: Daemon, pod: str) -> None:
    """As when the daemon stops."""
    call = asyncio.ensure_future(daemon.create(pod))
    await asyncio.sleep(0)
    for task in daemon.context.scope._tasks:
        if "create" in task.get_name():
            task.cancel()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(asyncio.CancelledError):
            await call
    assert daemon.context.locks._locks == {}
    await daemon.create(pod)
