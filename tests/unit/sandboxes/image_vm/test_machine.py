"""The life of a machine: made, started, ended in each way, stopped, resized, and made again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.unit.sandboxes.image_vm.bed import PATIENCE, POD_HAS, UP, Bed, Pod, until
from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import GuestContainerState, GuestPhase
from vmruntime.errors import Code, Internal
from vmruntime.hypervisor.fake_machine import FakeMachine
from vmruntime.hypervisor.interface import FirmwareBoot
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import VmSize
from vmruntime.sandboxes.image_vm import machine as machine_module

TERM, KILL = signal.SIGTERM, signal.SIGKILL


async def power_off(machine: FakeMachine) -> None:
    machine.power_off()


async def panic(machine: FakeMachine) -> None:
    machine.panic()


async def test_the_life_of_a_machine(bed: Bed, pod: Pod) -> None:
    assert await pod.agent.containers() == []
    told: list[GuestContainerState] = []

    async def listen() -> None:
        async for state in pod.agent.events():
            told.append(state)

    async with asyncio.TaskGroup() as group:
        listening = group.create_task(listen())
        await pod.agent.create(bed.container())
        assert (await pod.state()).phase is GuestPhase.CREATED
        assert bed.hypervisor.machines == {}
        started_at = await pod.agent.start("c")
        assert await pod.agent.start("c") == started_at
        machine = pod.machine
        assert isinstance(machine.spec.boot, FirmwareBoot)
        assert [disk.serial for disk in machine.spec.disks] == ["root", "seed"]
        assert [(nic.id, nic.mac) for nic in machine.nics.values()] == [("eth0", "02:00:00:00:00:01")]
        await until(lambda: UP in machine.console)
        assert machine.running
        machine.power_off()
        ended = await pod.ended()
        await until(lambda: len(told) == 2)
        listening.cancel()
    assert [state.phase for state in told] == [GuestPhase.RUNNING, GuestPhase.EXITED]
    assert told[1] == ended
    assert (ended.exit_code, ended.message) == (0, "the guest powered off")
    assert started_at == ended.started_at < ended.exited_at
    assert await bed.kinds(pod.sandbox) == POD_HAS | {ResourceKind.MACHINE}
    with pytest.raises(AgentError, match="has ended: the guest powered off"):
        await pod.agent.start("c")


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (power_off, 0, "the guest powered off"),
        (panic, 1, "the guest's kernel panicked"),
        (FakeMachine.crash, 137, "QEMU ended with status"),
        (FakeMachine.lose, 255, "QEMU ended with status 1"),
    ],
)
async def test_each_end_is_told(
    pod: Pod, end: Callable[[FakeMachine], Awaitable[None]], code: int, message: str
) -> None:
    machine = await pod.run()
    await end(machine)
    ended = await pod.ended()
    assert (ended.phase, ended.exit_code) == (GuestPhase.EXITED, code)
    assert ended.message.startswith(message)
    assert not pod.facts()["running"]
    with pytest.raises(AgentError, match="does not run") as caught:
        pod.agent.vm("c")
    assert caught.value.code is Code.FAILED_PRECONDITION


async def test_strangers_are_unknown(pod: Pod) -> None:
    await pod.run()
    with pytest.raises(AgentError, match="no container other") as caught:
        await pod.agent.start("other")
    assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(AgentError, match="no container other"):
        await pod.agent.signal("other", KILL)
    assert await pod.agent.delete("other") == []
    assert (await pod.state()).phase is GuestPhase.RUNNING


async def test_a_reboot_is_no_end(pod: Pod) -> None:
    machine = await pod.run()
    await machine.reboot()
    assert (await pod.state()).phase is GuestPhase.RUNNING
    assert pod.facts()["reboots"] == 1


async def test_only_one_container_at_a_time(bed: Bed, pod: Pod) -> None:
    await pod.run()
    with pytest.raises(AgentError, match="runs already") as caught:
        await pod.agent.create(bed.container("second"))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert (await pod.state()).id == "c"


async def test_a_machine_is_killed_while_it_starts(bed: Bed, pod: Pod) -> None:
    await pod.agent.create(bed.container())
    hold = bed.faults.hold("vm.resume")
    starting = asyncio.ensure_future(pod.agent.start("c"))
    await hold.reached.wait()
    killing = asyncio.ensure_future(pod.agent.signal("c", KILL))
    await asyncio.sleep(0)
    hold.release()
    await asyncio.wait_for(asyncio.gather(starting, killing), PATIENCE)
    ended = await pod.ended()
    assert (ended.exit_code, ended.message) == (137, "the VM was ended: it did not shut down in time")


async def test_a_machine_is_released_while_it_starts(bed: Bed) -> None:
    async with bed.started() as pod:
        await pod.agent.create(bed.container())
        hold = bed.faults.hold("vm.start done")
        starting = asyncio.ensure_future(pod.agent.start("c"))
        await hold.reached.wait()
        await bed.backend().release(pod.sandbox.id, final=True)
        hold.release()
        with pytest.raises(AgentError):
            await starting
        assert await bed.owned.ledger.owned_by(pod.sandbox.id) == []
        assert pod.machine.ended


async def test_a_container_that_was_never_started_can_be_stopped(bed: Bed, pod: Pod) -> None:
    await pod.agent.create(bed.container())
    await pod.agent.signal("c", TERM)
    assert (await pod.state()).phase is GuestPhase.CREATED
    await pod.agent.signal("c", KILL)
    ended = await pod.state()
    assert (ended.phase, ended.exit_code, ended.message) == (GuestPhase.EXITED, 137, "the VM was never started")
    with pytest.raises(AgentError, match="never started"):
        await pod.agent.start("c")


async def test_the_power_button_is_pressed_until_the_guest_is_off(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "PRESS_SECONDS", 0.02)
    machine = await pod.run()
    machine.obedient = False
    machine.hold()
    await pod.agent.signal("c", TERM)
    await pod.agent.signal("c", TERM)
    await until(lambda: machine.presses >= 3)
    assert machine.running, "a guest that is paused sees no button"
    machine.obedient = True
    ended = await pod.ended()
    assert (ended.exit_code, ended.message) == (0, "the guest powered off")
    presses = machine.presses
    await asyncio.sleep(0.05)
    assert machine.presses == presses


async def test_a_button_that_cannot_be_pressed_is_tried_again(
    bed: Bed, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module, "PRESS_SECONDS", 0.02)
    await pod.run()
    bed.faults.fail("vm.press_power_button", Internal("the monitor is busy"), times=2)
    await pod.agent.signal("c", TERM)
    assert (await pod.ended()).exit_code == 0
    assert bed.faults.steps.count("vm.press_power_button") == 3


async def test_the_next_container_is_not_pressed(bed: Bed, pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "PRESS_SECONDS", 0.02)
    first = await pod.run()
    first.obedient = False
    await pod.agent.signal("c", TERM)
    await until(lambda: first.presses > 0)
    first.power_off()
    await pod.ended()
    second = await pod.run("d")
    await asyncio.sleep(0.05)
    assert second.presses == 0
    await pod.agent.signal("d", TERM)
    assert (await pod.ended()).exit_code == 0


async def test_a_guest_that_does_not_heed_is_killed(pod: Pod) -> None:
    machine = await pod.run()
    machine.obedient = False
    await pod.running.shut_down(0.05)
    ended = await pod.ended()
    assert machine.presses == 1
    assert (ended.exit_code, ended.message) == (137, "the VM was ended: it did not shut down in time")
    await pod.running.shut_down(1)  # again: success


async def test_a_guest_that_heeds_is_not_killed(pod: Pod) -> None:
    await pod.run()
    await pod.running.shut_down(PATIENCE)
    assert (await pod.ended()).exit_code == 0


async def test_a_guest_that_ends_when_it_is_about_to_be_killed_has_ended_by_itself(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()

    async def off() -> None:
        machine.power_off()

    bed.faults.run("vm.kill", off)
    await pod.agent.signal("c", KILL)
    assert (await pod.ended()).exit_code == 0


async def test_a_kill_that_fails_is_no_kill(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()
    bed.faults.fail("vm.kill", Internal("nobody answers"))
    with pytest.raises(Internal, match="nobody answers"):
        await pod.agent.signal("c", KILL)
    await machine.lose()
    assert (await pod.ended()).exit_code == 255


async def test_an_end_is_told_whatever_fails_after_it(bed: Bed, pod: Pod) -> None:
    machine = await pod.run()
    pod.definition_file.with_suffix(".json.part").mkdir()  # nothing can be written there any more
    bed.faults.fail("vm.kill", Internal("nobody answers"))
    machine.power_off()
    assert (await pod.ended()).exit_code == 0
    await bed.no_machine(pod.sandbox, but={ResourceKind.MACHINE})
    pod.definition_file.with_suffix(".json.part").rmdir()


async def test_the_root_disk_stays_for_the_next_container(bed: Bed, pod: Pod) -> None:
    root = bed.paths.pod_disks(pod.sandbox.id) / "root.qcow2"
    first = await pod.run("c", envs=[("A", "1")])
    await until(lambda: UP in first.console)
    with root.open("ab") as file:
        file.write(b"what the guest wrote")
    first.power_off()
    await pod.ended()
    second = await pod.run("d", envs=[("A", "2")])
    assert root.read_bytes().endswith(b"what the guest wrote")
    assert second.spec.disks[0] == first.spec.disks[0]
    assert await pod.agent.delete("c") == []
    assert (await pod.state()).id == "d", "the container before it is forgotten already"
    async with pod.agent.output("d", 0) as reader:
        record = await anext(aiter(reader))
        assert record.data == UP.encode()
        assert record.seq > len(UP), "the console's file has the first run before it"


async def test_a_deleted_container_leaves_the_disk_only(bed: Bed, pod: Pod) -> None:
    await pod.run()
    assert await pod.agent.delete("c") == []
    assert await pod.agent.containers() == []
    await bed.no_machine(pod.sandbox)
    assert not pod.definition_file.exists()
    assert (bed.paths.pod_disks(pod.sandbox.id) / "root.qcow2").exists()
    assert await pod.agent.delete("c") == []


async def test_a_machine_grows_before_it_starts_and_while_it_runs(
    bed: Bed, pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmruntime.sandboxes.image_vm.guest_link.ANSWER_SECONDS", 0.05)
    await pod.agent.create(bed.container())
    grown = VmSize(vcpus=2, memory_mib=2048, max_vcpus=4, max_memory_mib=8192)
    await pod.running.resize(grown)
    await pod.agent.start("c")
    assert pod.machine.spec.size == grown
    await pod.running.resize(VmSize(vcpus=3, memory_mib=4096))
    assert (pod.machine.size.vcpus, pod.machine.size.memory_mib) == (3, 4096)
    assert pod.facts()["memory_mib"] == 4096


async def test_a_machine_that_does_not_grow_is_as_large_as_before(bed: Bed, pod: Pod) -> None:
    await pod.run()
    before = pod.facts()
    bed.faults.fail("vm.resize", Internal("no room"))
    with pytest.raises(Internal, match="no room"):
        await pod.running.resize(VmSize(vcpus=2, memory_mib=4096))
    assert pod.facts() == before


async def test_pods_have_uuids_of_their_own(bed: Bed) -> None:
    uuid = "5a2b3c4d-0000-4000-8000-00000000000a"
    async with bed.started(bed.sandbox(system_uuid=uuid)) as first:
        machine = await first.run()
        owned = await bed.owned.ledger.owned_by(first.sandbox.id)
        async with bed.started(bed.sandbox(system_uuid=uuid)) as second:
            await second.agent.create(bed.container("d"))
            with pytest.raises(AgentError, match=rf"system-uuid: '{uuid}' is taken by another pod's machine") as caught:
                await second.agent.start("d")
            assert caught.value.code is Code.FAILED_PRECONDITION
            await bed.no_machine(second.sandbox)
            assert await second.agent.delete("d") == []
        assert await bed.owned.ledger.owned_by(first.sandbox.id) == owned
        assert not machine.ended
        assert bed.hypervisor.forgotten == []
        await first.agent.delete("c")
        async with bed.started(bed.sandbox(system_uuid=uuid)) as third:
            await third.run()
            assert (await third.state()).phase is GuestPhase.RUNNING


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
async def test_volumes_of_a_container_go_with_it(bed: Bed, pod: Pod, tmp_path: Path) -> None:
    """Its machine has ended when it is removed; what is published of the host must not stay for the next one."""
    share = bed.paths.share(pod.sandbox.id)
    (share / "c" / "0").mkdir(parents=True)
    machine = await pod.run()
    machine.power_off()
    await pod.ended()
    await pod.running.withdraw_volumes("c")
    assert not (share / "c").exists()
    share.rmdir()
