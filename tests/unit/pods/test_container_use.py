"""What is done with a container that runs: logs, commands, streams, limits, usage."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.pods.bed import PATIENCE, TRAP, Daemon, until_ready
from vmruntime.agent.errors import AgentError, AgentGone, AgentLied, AgentSilent
from vmruntime.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
)
from vmruntime.hypervisor.errors import VmHeld
from vmruntime.model.resources import LinuxResources
from vmruntime.model.streams import AttachSpec, ExecSpec


async def test_a_log_that_is_rotated(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod, "sh", "-c", "echo ready; cat", stdin=True)
    await until_ready(daemon)
    log = Path(daemon.pods.container(container).spec.log_path)
    log.rename(log.with_suffix(".1"))
    await daemon.pods.reopen_log(container)
    stdin = daemon.machine(pod).guest.containers[container].process.stdin
    await stdin.put(b"after\n")
    await stdin.put(b"")
    await daemon.ended(container)
    assert daemon.world.log() == "stdout F after"
    with pytest.raises(FailedPrecondition, match=f"{container} is exited, not running"):
        await daemon.pods.reopen_log(container)
    with pytest.raises(NotFound):
        await daemon.pods.reopen_log("unknown")


async def test_everything_is_in_the_log_when_the_end_is_told(daemon: Daemon, pod: str) -> None:
    daemon.faults.delay("agent.output", 0.2)
    container = await daemon.run(pod, "sh", "-c", "echo late")
    await daemon.ended(container)
    assert daemon.world.log() == "stdout F late"


async def test_output_goes_on_after_its_connection_broke(daemon: Daemon, pod: str) -> None:
    daemon.faults.fail("agent.output", AgentGone("broken"), times=2)
    container = await daemon.run(pod, "sh", "-c", "echo one; echo two")
    await daemon.ended(container)
    assert daemon.world.log() == "stdout F one\nstdout F two"


async def test_a_container_without_a_log(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod, "sh", "-c", "echo unheard", log_path="")
    assert (await daemon.ended(container)).exit_code == 0


async def test_a_command_in_a_container(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    answer = await daemon.pods.exec_sync(container, ["sh", "-c", "echo out; echo err >&2; exit 4"], 0)
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 4)


async def test_a_command_that_is_not_there(daemon: Daemon, pod: str) -> None:
    """An exec probe fails; it is not unknown."""
    container = await daemon.run(pod)
    answer = await daemon.pods.exec_sync(container, ["no-such-program"], 0)
    assert (answer.exit_code, answer.stdout) == (127, b"")
    assert answer.stderr == b'exec: "no-such-program": executable file not found in $PATH\n'


async def test_a_command_that_takes_too_long(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    with pytest.raises(DeadlineExceeded, match=r"'sleep' was killed after 0\.05 s, its time-out"):
        await daemon.pods.exec_sync(container, ["sleep", "1000"], 0.05)


async def test_commands_where_there_can_be_none(daemon: Daemon, pod: str) -> None:
    created = await daemon.create(pod)
    with pytest.raises(FailedPrecondition, match="created, not running"):
        await daemon.pods.exec_sync(created, ["true"], 0)
    with pytest.raises(NotFound, match="unknown"):
        await daemon.pods.exec_sync("unknown", ["true"], 0)
    await daemon.pods.start_container(created)
    for argv in ([], [""]):
        with pytest.raises(InvalidArgument, match="cmd"):
            await daemon.pods.exec_sync(created, argv, 0)


async def test_a_command_whose_vm_ends(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    call = asyncio.ensure_future(daemon.pods.exec_sync(container, ["sleep", "1000"], 0))
    async with asyncio.timeout(PATIENCE):
        while "agent.exec" not in daemon.faults.steps:
            await asyncio.sleep(0.01)
    await daemon.machine(pod).end("the power went")
    with pytest.raises(AgentGone, match="the pod's VM ended meanwhile: the power went"):
        await call


async def test_the_streams_of_a_command(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod)
    async with daemon.pods.exec(ExecSpec(container_id=container, argv=["cat"], stdin=True)) as command:
        await command.write(b"typed")
        await command.close_input()
        said = b"".join([chunk.data async for chunk in command.output()])
    assert (said, command.end.exit_code) == (b"typed", 0)


async def test_attaching(daemon: Daemon, pod: str) -> None:
    """Before the start, so that nothing is missed; not once it has ended."""
    container = await daemon.create(pod, "sh", "-c", "echo hello")
    async with daemon.pods.attach(AttachSpec(container_id=container)) as joined:
        output = joined.output()
        assert (await anext(output)).data == b""
        await daemon.pods.start_container(container)
        assert b"".join([chunk.data async for chunk in output]) == b"hello\n"
    await daemon.ended(container)
    with pytest.raises(FailedPrecondition, match="exited"):
        async with daemon.pods.attach(AttachSpec(container_id=container)):
            pass


async def test_limits_of_a_running_container(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod, resources=LinuxResources(memory_limit=64 << 20))
    wanted = LinuxResources(memory_limit=2 << 30, cpu_quota=200_000, cpu_period=100_000)
    await daemon.pods.update_container(container, wanted)
    machine = daemon.machine(pod)
    assert machine.size is not None
    assert (machine.size.memory_mib > 2048, machine.size.vcpus) == (True, 2)
    (sent,) = machine.guest.containers[container].resources
    assert b"2147483648" in sent
    assert daemon.pods.container(container).spec.resources == wanted
    daemon.faults.fail("agent.update", AgentError("no", Code.INTERNAL))
    with pytest.raises(AgentError, match="no"):
        await daemon.pods.update_container(container, LinuxResources(memory_limit=1 << 30))
    assert daemon.pods.container(container).spec.resources == wanted
    await daemon.pods.stop_container(container, 0)
    with pytest.raises(FailedPrecondition, match="exited"):
        await daemon.pods.update_container(container, wanted)
    with pytest.raises(NotFound):
        await daemon.pods.update_container("unknown", wanted)


async def test_a_vm_grows_for_a_container(daemon: Daemon, pod: str) -> None:
    container = await daemon.create(pod, resources=LinuxResources(memory_limit=4 << 30))
    size = daemon.machine(pod).size
    assert size is not None
    assert size.memory_mib > 4096
    await daemon.pods.remove_container(container)
    daemon.faults.fail("sandbox.resize", Internal("no room"))
    with pytest.raises(Internal, match="no room"):
        await daemon.create(pod, resources=LinuxResources(memory_limit=4 << 30))
    daemon.pod_as_new(pod)


async def test_usage_of_containers(daemon: Daemon, pod: str) -> None:
    one, two = await daemon.run(pod), await daemon.run(await daemon.run_pod("other"))
    idle = await daemon.create(pod, name="idle")
    assert {usage.id for usage in await daemon.pods.usage([one, two, idle])} == {one, two}
    with pytest.raises(NotFound):
        await daemon.pods.usage(["unknown"])


@pytest.mark.parametrize(
    "error",
    [AgentGone("it went"), AgentLied("a number is negative"), AgentError("too late", Code.DEADLINE_EXCEEDED)],
)
async def test_a_guest_that_is_not_measured_costs_the_others_nothing(
    daemon: Daemon, pod: str, error: AgentError
) -> None:
    one, two = await daemon.run(pod), await daemon.run(await daemon.run_pod("other"))
    daemon.faults.fail("agent.stats", error)
    assert len(await daemon.pods.usage([one, two])) == 1


async def test_guests_are_measured_at_the_same_time(daemon: Daemon, pod: str) -> None:
    one, two = await daemon.run(pod), await daemon.run(await daemon.run_pod("other"))
    slow = daemon.faults.hold("agent.stats")
    asking = asyncio.ensure_future(daemon.pods.usage([one, two]))
    async with asyncio.timeout(PATIENCE):
        await slow.reached.wait()
        while "agent.stats done" not in daemon.faults.steps:
            await asyncio.sleep(0)
    slow.release()
    assert {usage.id for usage in await asking} == {one, two}


async def test_a_vm_that_is_held(daemon: Daemon, pod: str) -> None:
    """Its guest does not run: whoever wants something of it hears why, and does not wait until the time is up."""
    container = await daemon.run(pod, "sh", "-c", TRAP)
    await until_ready(daemon)
    daemon.machine(pod).held = "the host has no room"
    words = r"the pod's VM is held: the host has no room \(free space there; the VM then goes on"
    with pytest.raises(VmHeld, match=words):
        await daemon.pods.exec_sync(container, ["true"], 5.0)
    with pytest.raises(VmHeld, match=words):
        async with daemon.pods.exec(ExecSpec(container_id=container, argv=["true"])):
            pass
    with pytest.raises(VmHeld, match=words):
        async with daemon.pods.attach(AttachSpec(container_id=container)):
            pass
    with pytest.raises(VmHeld, match=words):
        async with daemon.pods.ports(pod):
            pass
    with pytest.raises(VmHeld, match=words):
        await daemon.create(pod, "true", name="second")
    assert [one.id for one in daemon.pods.containers()] == [container]
    daemon.machine(pod).held = ""
    assert (await daemon.pods.exec_sync(container, ["true"], 5.0)).exit_code == 0


async def test_a_vm_that_is_held_while_it_is_used(daemon: Daemon, pod: str) -> None:
    container = await daemon.run(pod, "sh", "-c", TRAP)
    await until_ready(daemon)

    async def silent() -> None:
        daemon.machine(pod).held = "the host has no room"
        raise AgentSilent

    daemon.faults.run("agent.exec", silent)
    with pytest.raises(VmHeld, match="is held"):
        await daemon.pods.exec_sync(container, ["true"], 5.0)
