"""What the next daemon makes of a pod and its machine, in whatever state the last one left them."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path

import msgspec
import pytest

from tests.unit.sandboxes.image_vm.bed import PATIENCE, POD_HAS, UP, Bed, Pod, until
from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import GuestPhase
from vmruntime.aio.faults import EVERY_STEP
from vmruntime.errors import Internal
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.fake_machine import FakeMachine
from vmruntime.model.ledger import ResourceKind
from vmruntime.pods.log_pump import LogPump
from vmruntime.sandboxes.image_vm.definition import Definition


async def test_a_pod_without_a_container(bed: Bed, pod: Pod) -> None:
    await pod.restart()
    assert await pod.agent.containers() == []
    await pod.run()
    assert (await pod.state()).phase is GuestPhase.RUNNING


async def test_a_container_that_was_only_made(bed: Bed, pod: Pod) -> None:
    await pod.agent.create(bed.container())
    before = await pod.state()
    await pod.restart()
    assert await pod.state() == before
    await pod.agent.start("c")
    assert (await pod.state()).phase is GuestPhase.RUNNING


async def test_a_machine_that_runs(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()
    before = await pod.state()
    await pod.restart()
    assert await pod.state() == before
    assert await pod.agent.start("c") == before.started_at
    assert pod.facts()["running"]
    await pod.agent.signal("c", 15)
    ended = await pod.ended()
    assert (ended.exit_code, ended.message, machine.presses) == (0, "the guest powered off", 1)


@pytest.mark.parametrize(("end", "code"), [("power_off", 0), ("panic", 1)])
async def test_a_machine_that_ended_meanwhile(pod: Pod, end: str, code: int) -> None:
    """Its hypervisor holds it until somebody has learnt how."""
    machine = await pod.run()
    await pod.running.close()
    getattr(machine, end)()
    await pod.adopt()
    ended = await pod.ended()
    assert (ended.phase, ended.exit_code) == (GuestPhase.EXITED, code)
    await pod.restart()
    assert await pod.state() == ended


async def test_a_machine_that_is_gone(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()
    await pod.running.close()
    await machine.crash()
    await pod.adopt()
    ended = await pod.ended()
    assert ended.exit_code == 255
    assert ended.message == "the VM ended while no daemon was running: QEMU ended while no daemon was running"
    await bed.no_machine(pod.sandbox, but={ResourceKind.MACHINE})
    await pod.run("d")
    assert (await pod.state()).phase is GuestPhase.RUNNING


async def test_a_machine_whose_monitor_does_not_answer_is_ended(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()
    bed.faults.fail("vm.adopt", HypervisorError("its monitor does not answer"))
    await pod.restart()
    ended = await pod.ended()
    assert (ended.exit_code, "monitor does not answer" in ended.message) == (255, True)
    await until(lambda: machine.ended)


async def test_a_machine_whose_driver_is_no_more(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()
    (row,) = [one for one in await bed.owned.ledger.owned_by(pod.sandbox.id) if one.kind is ResourceKind.MACHINE]
    await bed.owned.ledger.record(msgspec.structs.replace(row, data={"driver": "libvirt"}))
    await pod.restart()
    assert "the driver libvirt, which it runs under, cannot be used any more" in (await pod.ended()).message
    await until(lambda: machine.ended)


async def test_an_end_that_was_seen_but_not_cleaned_up_after(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()
    hold = bed.faults.hold("vm.kill")
    machine.power_off()
    await hold.reached.wait()
    ended = await pod.state()
    assert ended.phase is GuestPhase.EXITED
    assert ResourceKind.CID in await bed.kinds(pod.sandbox)
    await pod.restart()
    assert await pod.state() == ended
    await bed.no_machine(pod.sandbox, but={ResourceKind.MACHINE})


async def test_a_daemon_is_killed_while_it_starts_a_machine(bed: Bed) -> None:
    """At each step. The container is created still, or runs; never a machine that nobody lets go on."""
    for number in range(60):
        async with asyncio.timeout(PATIENCE), bed.started() as pod:
            await pod.agent.create(bed.container())
            hold = bed.faults.hold(EVERY_STEP, skip=number)
            starting = asyncio.ensure_future(pod.agent.start("c"))
            reached = asyncio.ensure_future(hold.reached.wait())
            await asyncio.wait({starting, reached}, return_when=asyncio.FIRST_COMPLETED)
            was_reached = reached.done()
            reached.cancel()
            bed.faults._orders.clear()
            dead = pod.running
            await pod.adopt()  # beside the other, which is held for ever
            state = await pod.state()
            if state.phase is GuestPhase.CREATED:
                assert state.started_at == 0
                assert await bed.kinds(pod.sandbox) == POD_HAS
                await pod.agent.start("c")
            assert (await pod.state()).phase is GuestPhase.RUNNING
            assert pod.machine.running
            starting.cancel()
            await asyncio.wait({starting})
            await dead.close()
        if not was_reached:
            break
    assert number > 10


@pytest.mark.parametrize("content", [b"", b'{"container_id": "c", "image', b"[]", b"\xff\xfe"])
async def test_what_a_machine_is_made_of_cannot_be_read(bed: Bed, pod: Pod, content: bytes) -> None:
    machine = await pod.run()
    await pod.running.close()
    pod.definition_file.write_bytes(content)
    with pytest.raises(Internal, match=r"cannot be read from .*/machine\.json"):
        await pod.adopt()
    await bed.backend().release(pod.sandbox.id, final=False)  # as recovery does then
    assert machine.ended
    assert await bed.kinds(pod.sandbox) == {ResourceKind.DIRECTORY}


async def test_what_was_half_written_does_not_count(pod: Pod) -> None:
    await pod.run()
    before = await pod.state()
    pod.definition_file.with_name("machine.json.part").write_bytes(b"{")
    await pod.restart()
    assert await pod.state() == before
    await pod.agent.signal("c", 9)
    assert (await pod.ended()).exit_code == 137


async def test_a_pod_whose_network_is_gone_cannot_be_taken_over(bed: Bed, pod: Pod) -> None:
    await pod.run()
    await pod.running.close()
    (bed.base / "netns").unlink()
    with pytest.raises(VmGone, match="host was started anew"):
        await pod.adopt()


async def test_a_pod_whose_directories_are_gone(bed: Bed, pod: Pod) -> None:
    """They are on a tmpfs that somebody has emptied, say; the pod can be removed all the same."""
    machine = await pod.run()
    await pod.running.close()
    shutil.rmtree(bed.paths.pod_disks(pod.sandbox.id))
    await pod.adopt()
    assert await pod.agent.containers() == []
    await until(lambda: machine.ended)


def tell(machine: FakeMachine, message: bytes) -> None:
    """Say something to the host as systemd does."""
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(f"{machine.handle.vsock}_{machine.handle.cid}")
        guest.sendall(message)


async def test_a_guest_says_once_that_it_is_up(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()
    assert pod.facts()["guest_ready"] is False
    tell(machine, b"STATUS=Booting\n")
    tell(machine, b"READY=0\n")
    tell(machine, b"READY=1\nSTATUS=Ready.\n")
    await until(lambda: bool(pod.facts()["guest_ready"]))
    tell(machine, b"READY=1\n")
    await pod.restart()
    assert pod.facts()["guest_ready"] is True
    machine.power_off()
    await pod.ended()
    again = await pod.run("d")
    assert pod.facts()["guest_ready"] is False
    await pod.restart()
    tell(again, b"READY=1\n")  # the next daemon listens, too
    await until(lambda: bool(pod.facts()["guest_ready"]))


async def test_a_log_is_exact_whatever_daemons_do(bed: Bed, pod: Pod, tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    machine = await pod.run()

    async def read_until(last: str) -> None:
        pump = LogPump(pod.agent, "c", str(path), tmp_path / "position")
        await pump.open()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(pump.run())
            await until(lambda: path.read_text().endswith(f" {last}\n"))
            task.cancel()

    await until(lambda: UP in machine.console)
    said = [UP]
    for daemon in range(3):
        for number in range(200):
            said.append(f"daemon {daemon} line {number}")
            machine.say(said[-1])
        await read_until(said[-1])
        await pod.running.close()
        said.append(f"after daemon {daemon}")
        machine.say(said[-1])
        await pod.adopt()
    await pod.running.close()
    said.append("Power down")
    machine.say(said[-1])
    machine.power_off()
    await pod.adopt()
    await pod.ended()
    pump = LogPump(pod.agent, "c", str(path), tmp_path / "position")
    await pump.open()
    await asyncio.wait_for(pump.run(), PATIENCE)
    assert [line.split(" ", 3)[3] for line in path.read_text().splitlines()] == said


async def test_a_definition_has_everything_that_counts(pod: Pod) -> None:
    await pod.run()
    written = msgspec.json.decode(pod.definition_file.read_bytes(), type=Definition)
    assert written == pod.running.machine.definition
    assert (written.container_id, written.booted, written.ended) == ("c", True, None)
    assert pod.definition_file.stat().st_mode & 0o777 == 0o600
    await pod.agent.delete("c")
    with pytest.raises(AgentError, match="no container c"):
        await pod.agent.start("c")
