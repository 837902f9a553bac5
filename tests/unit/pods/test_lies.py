"""Guests that lie about their containers: by the thousand, without end, about others', about what cannot be."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.unit.pods.bed import PATIENCE, Daemon, daemon_on, state
from vmruntime.agent.errors import AgentGone, AgentLied
from vmruntime.agent.interface import ExecOutput, GuestContainerState, GuestPhase
from vmruntime.errors import VmruntimeError
from vmruntime.model.container import ContainerState, ContainerUser
from vmruntime.model.output import OutputRecord
from vmruntime.model.sandbox import SandboxState
from vmruntime.model.stats import ContainerUsage, GuestUsage, InterfaceUsage
from vmruntime.model.streams import ExecEnd

FLOOD = 5000
MOST_TASKS = 40
NS = st.integers(0, 1 << 63)
U64 = st.integers(0, 2**64 - 1)


async def test_an_end_told_a_thousand_times_is_heard_once(daemon: Daemon, pod: str) -> None:
    """While its output is not drained yet, so that each one would have to wait."""
    container = await daemon.run(pod)
    guest = daemon.machine(pod).guest
    ended = replace(guest.containers[container].state, phase=GuestPhase.EXITED, exit_code=1)
    before = len(asyncio.all_tasks())
    for number in range(FLOOD):
        guest.publish(replace(ended, exit_code=number % 256))
        guest.publish(replace(ended, id=f"stranger{number}"))
    heard = daemon.faults.steps.count("agent.events")
    for _ in range(200):
        await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) - before < MOST_TASKS
    guest.containers[container].output.close()
    assert (await daemon.ended(container)).exit_code == 0
    assert daemon.faults.steps.count("agent.events") == heard


async def test_events_that_break_the_protocol_are_asked_for_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmruntime.pods.monitor.RETRY_SECONDS", 0.01)
    daemon.faults.fail("agent.events", AgentLied("a message is of no kind"), times=20)
    pod = await daemon.run_pod()
    container = await daemon.run(pod, "true")
    assert (await daemon.ended(container)).exit_code == 0


async def test_output_that_breaks_the_protocol_ends_the_log(daemon: Daemon, pod: str) -> None:
    """Nothing after it can be trusted; the container goes on and its end is told."""
    daemon.faults.fail("agent.output", AgentLied("an output record has number 7, not 1"))
    container = await daemon.run(pod, "sh", "-c", "echo unheard; exit 3")
    assert (await daemon.ended(container)).exit_code == 3
    assert daemon.world.log() == ""


async def test_a_guest_that_hands_out_what_is_not_its_own(daemon: Daemon, pod: str) -> None:
    """A layer, a container, a user: what it names cannot hurt another container or pod."""
    other = await daemon.run_pod("other")
    mine, theirs = await daemon.run(pod), await daemon.run(other)
    daemon.faults.lie("agent.delete", ["scratch", *daemon.machine(other).layers])
    second = await daemon.create(pod, name="second")
    await daemon.pods.remove_container(second)
    assert daemon.machine(other).layers
    assert (state(daemon, mine), state(daemon, theirs)) == (ContainerState.RUNNING, ContainerState.RUNNING)


states = st.builds(
    GuestContainerState,
    id=st.one_of(st.sampled_from(["app", "second", "theirs"]), st.text(max_size=8)),
    phase=st.sampled_from(GuestPhase),
    pid=st.integers(0, 1 << 22),
    started_at=NS,
    exited_at=NS,
    exit_code=st.integers(0, 255),
    oom_killed=st.booleans(),
)
usage = st.builds(
    GuestUsage,
    time=NS,
    containers=st.lists(st.builds(ContainerUsage, id=st.sampled_from(["app", "x"]), time=NS, cpu_ns=U64, pids=U64)),
    interfaces=st.lists(st.builds(InterfaceUsage, name=st.text(max_size=15), rx_bytes=U64), max_size=3),
    memory_total=U64,
    memory_available=U64,
)
LIES: dict[str, st.SearchStrategy[Any]] = {
    "agent.create": st.tuples(
        st.integers(1, 1 << 22), st.builds(ContainerUser, uid=st.integers(0, 2**32 - 1), gid=st.integers(0, 2**32 - 1))
    ),
    "agent.start": st.integers(1, 1 << 63),
    "agent.delete": st.lists(st.text(max_size=36), max_size=5),
    "agent.containers": st.lists(states, max_size=5),
    "agent.events": states,
    "agent.output": st.builds(
        OutputRecord, st.integers(1, 3), st.booleans(), NS, st.booleans(), st.sampled_from([b"", b"\x1b[2J", b"x"])
    ),
    "agent.exec_sync": st.builds(
        ExecOutput,
        stdout=st.binary(max_size=9),
        stderr=st.binary(max_size=9),
        end=st.builds(ExecEnd, exit_code=st.integers(0, 255), timed_out=st.booleans(), error=st.text(max_size=9)),
    ),
    "agent.stats": usage,
}


@settings(
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    lies=st.lists(st.sampled_from(sorted(LIES)).flatmap(lambda step: st.tuples(st.just(step), LIES[step])), max_size=8)
)
def test_whatever_a_guest_says_its_pod_can_be_used_and_removed(
    lies: list[tuple[str, Any]],
) -> None:
    """What passes the client's checks may still make no sense."""

    async def run() -> None:
        async with daemon_on(Path(directory) / "world") as daemon, asyncio.timeout(PATIENCE):
            pod, other = await daemon.run_pod(), await daemon.run_pod("other")
            theirs = await daemon.run(other)
            following = [daemon.world.id_number(daemon.world.ids + number) for number in (1, 2)]
            ids = dict(zip(("app", "second", "theirs"), (*following, theirs), strict=True))
            for step, lie in lies:
                daemon.faults.lie(step, _with_ids(lie, ids))
            await life(daemon, pod)
            assert state(daemon, theirs) is ContainerState.RUNNING or any(step == "agent.events" for step, _ in lies)
            assert daemon.pods.sandbox(other).state is SandboxState.READY

    # Hypothesis runs this many times: no fixtures. Where an end is lied about, stopping takes its time.
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmruntime.pods.container_stop.KILL_SECONDS", 0.05)
        asyncio.run(run())


async def life(daemon: Daemon, pod: str) -> None:
    """Use a pod as kubelet does, whose calls fail in ways it understands."""
    for name, argv in (("app", ("sleep", "1000")), ("second", ("true",))):
        try:
            container = await daemon.create(pod, *argv, name=name)
            await daemon.pods.start_container(container)
            await daemon.pods.exec_sync(container, ["true"], 0)
            await daemon.pods.usage([container])
            await daemon.pods.sandbox_usage([pod])
            await daemon.pods.stop_container(container, 0.01)
            await daemon.pods.remove_container(container)
        except AgentGone:
            raise
        except VmruntimeError:
            continue


def _with_ids(lie: Any, ids: dict[str, str]) -> Any:
    """Return a lie in which containers of the test are meant."""
    if isinstance(lie, GuestContainerState):
        return replace(lie, id=ids.get(lie.id, lie.id))
    if isinstance(lie, list):
        return [_with_ids(one, ids) for one in lie]
    return lie
