"""Starts of machines that fail, or that nobody waits for any more, at each step: nothing is left, and it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from tests.unit.sandboxes.image_vm.bed import PATIENCE, Bed, Pod
from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import GuestPhase
from vmruntime.aio.faults import EVERY_STEP
from vmruntime.config.settings import VolumeSettings
from vmruntime.errors import Code, Internal
from vmruntime.hypervisor.errors import VmGone
from vmruntime.model.container import Mount
from vmruntime.model.ledger import ResourceKind

STEPS_LIMIT = 60
IN_THE_GUEST = "vm.boot"
"""The step whose failure is the guest's, which boots after the start."""


async def each_step(attempt: Callable[[int], Awaitable[bool]]) -> int:
    for number in range(STEPS_LIMIT):
        async with asyncio.timeout(PATIENCE):
            if not await attempt(number):
                return number
    raise AssertionError("the steps do not end")


@pytest.mark.parametrize(
    "error", [Internal("this step fails"), VmGone("this step ends it"), OSError(28, "this step fills the disk")]
)
async def test_a_step_fails(bed: Bed, error: Exception) -> None:
    async with bed.started() as pod:
        await pod.agent.create(bed.container())
        bed.faults.steps.clear()
        await pod.agent.start("c")
        steps = list(bed.faults.steps)
    assert {"store.write", "vm.start", "vm.process qemu", "network.open_taps", "vm.attach_nic", "vm.resume"} <= set(
        steps
    )
    for number in (number for number, step in enumerate(steps) if step != IN_THE_GUEST):
        async with asyncio.timeout(PATIENCE), bed.started() as pod:
            await pod.agent.create(bed.container())
            bed.faults.fail(EVERY_STEP, error, skip=number)
            with pytest.raises(AgentError, match="this step") as told:
                await pod.agent.start("c")
            assert told.value.code is Code.FAILED_PRECONDITION
            state = await pod.state()
            assert (state.phase, state.exit_code, state.started_at) == (GuestPhase.EXITED, 255, 0)
            assert state.message.startswith("the VM could not be started: ")
            await bed.no_machine(pod.sandbox)
            await pod.restart()
            assert await pod.state() == state
            await pod.run("d")
            assert (await pod.state()).phase is GuestPhase.RUNNING


async def test_a_caller_goes_away(bed: Bed) -> None:
    """The container is as it was: created."""

    async def attempt(number: int) -> bool:
        async with bed.started() as pod:
            await pod.agent.create(bed.container())
            hold = bed.faults.hold(EVERY_STEP, skip=number)
            starting = asyncio.ensure_future(pod.agent.start("c"))
            reached = asyncio.ensure_future(hold.reached.wait())
            await asyncio.wait({starting, reached}, return_when=asyncio.FIRST_COMPLETED)
            was_reached = reached.done()
            reached.cancel()
            if not starting.done():
                starting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await starting
                state = await pod.state()
                assert (state.phase, state.started_at) == (GuestPhase.CREATED, 0)
                await bed.no_machine(pod.sandbox)
                await pod.restart()
                assert await pod.state() == state
                await pod.agent.start("c")
            assert (await pod.state()).phase is GuestPhase.RUNNING
            hold.release()
            return was_reached

    assert await each_step(attempt) > 10


async def test_what_goes_wrong_twice_is_undone_by_the_next_start(bed: Bed, pod: Pod) -> None:
    await pod.agent.create(bed.container())
    bed.faults.fail("vm.resume", Internal("it does not run"))
    bed.faults.fail("vm.kill", Internal("and cannot be killed"))
    with pytest.raises(AgentError, match="cannot be killed"):
        await pod.agent.start("c")
    await bed.no_machine(pod.sandbox)  # its process was ended all the same
    await pod.run("d")
    assert (await pod.state()).phase is GuestPhase.RUNNING


async def test_a_host_without_a_dhcp_server(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmruntime.network.dhcp.PATH", str(tmp_path))
    async with bed.started(bed.sandbox("10.88.0.2/16", force_dhcp=True)) as pod:
        await pod.agent.create(bed.container())
        with pytest.raises(AgentError, match="dnsmasq.*install"):
            await pod.agent.start("c")
        assert (await pod.state()).phase is GuestPhase.EXITED
        await bed.no_machine(pod.sandbox)
    async with bed.started(bed.sandbox("10.88.0.2/16")) as pod:
        machine = await pod.run()
        assert machine.running, "cloud-init tells it its address, too"


async def test_a_host_without_a_tpm(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bed.started(bed.sandbox(tpm=True)) as pod:
        await pod.agent.create(bed.container())
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            with pytest.raises(AgentError, match=r"vmruntime\.io/tpm.*install swtpm"):
                await pod.agent.start("c")
        await bed.no_machine(pod.sandbox)
        assert bed.hypervisor.machines == {}


@pytest.mark.root
async def test_a_share_that_nobody_serves(bed: Bed, tmp_path: Path) -> None:
    bed.settings = msgspec.structs.replace(bed.settings, volumes=VolumeSettings(virtiofsd=str(tmp_path / "missing")))
    volume = tmp_path / "volume"
    volume.mkdir()
    async with bed.started() as pod:
        await pod.agent.create(bed.container(mounts=[Mount(container_path="/v", host_path=str(volume))]))
        with pytest.raises(AgentError, match="virtiofsd"):
            await pod.agent.start("c")
        assert (await pod.state()).phase is GuestPhase.EXITED
        await bed.no_machine(pod.sandbox, but={ResourceKind.SHARE})
