"""What tests can do to a fake machine that boots from its disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from vmruntime.aio.detached import ProcessIdentity
from vmruntime.hypervisor.errors import VmGone
from vmruntime.hypervisor.fake import FakeHypervisor, FakeVm
from vmruntime.hypervisor.fake_machine import FakeMachine
from vmruntime.hypervisor.interface import FirmwareBoot, VmEnd, VmSpec
from vmruntime.model.resources import VmSize

UUID = "8a2b1c52-0000-4000-8000-0123456789ab"


class Guest:
    """Says that it is up, and answers on its console."""

    async def boot(self, machine: FakeMachine) -> None:
        machine.on_typed = lambda data: machine.say(f"you said {data.decode()}")
        machine.say("login:")

    async def die(self) -> None:
        pass


async def nothing(role: str, identity: ProcessIdentity) -> None:
    pass


@pytest_asyncio.fixture
async def hypervisor() -> AsyncIterator[FakeHypervisor]:
    hypervisor = FakeHypervisor(lambda spec: Guest())
    yield hypervisor
    await hypervisor.close()


@pytest_asyncio.fixture
async def vm(hypervisor: FakeHypervisor, tmp_path: Path) -> FakeVm:
    boot = FirmwareBoot(name="small", uuid=UUID, vnc=True)
    size = VmSize(vcpus=1, memory_mib=128)
    return await hypervisor.start(VmSpec(id="a" * 64, size=size, boot=boot, directory=tmp_path, cid=0), nothing)


async def test_it_boots_when_it_is_let_run(vm: FakeVm, tmp_path: Path) -> None:
    await asyncio.sleep(0.01)
    assert (tmp_path / "console.log").read_bytes() == b""
    assert (vm.handle.uuid, vm.handle.vsock, vm.handle.helpers) == (UUID, "", [])
    await vm.resume()
    await vm.wait_for_console("login:")
    assert (tmp_path / "console.log").read_bytes() == b"login:\r\n"
    await vm.resume()
    await vm.machine.reboot()
    assert (vm.reboots, vm.machine.console) == (1, ["login:", "login:"])


async def test_its_console_can_be_joined(vm: FakeVm, tmp_path: Path) -> None:
    await vm.resume()
    await vm.wait_for_console("login:")
    reader, writer = await asyncio.open_unix_connection(tmp_path / "console.sock")
    writer.write(b"root")
    assert await reader.readline() == b"you said root\r\n"
    writer.close()
    await writer.wait_closed()
    assert vm.machine.typed == b"root"


async def test_the_power_button(vm: FakeVm) -> None:
    await vm.resume()
    vm.machine.obedient = False
    await vm.press_power_button()
    assert (vm.machine.presses, vm.machine.ended) == (1, False)
    vm.machine.obedient = True
    await vm.press_power_button()
    assert await vm.wait() == "the guest powered off"
    assert vm.end is VmEnd.POWEROFF


@pytest.mark.parametrize(
    ("turn_off", "end"),
    [(FakeMachine.power_off, VmEnd.POWEROFF), (FakeMachine.panic, VmEnd.CRASH)],
    ids=["power-off", "panic"],
)
async def test_an_end_that_nobody_saw_is_told_until_the_machine_is_killed(
    hypervisor: FakeHypervisor, vm: FakeVm, turn_off: Callable[[FakeMachine], None], end: VmEnd
) -> None:
    await vm.close()
    turn_off(vm.machine)
    second = await hypervisor.adopt(vm.handle)
    assert await second.wait()
    assert second.end is end
    await second.kill()
    assert second.end is end
    with pytest.raises(VmGone):
        await hypervisor.adopt(vm.handle)


async def test_killed_lost_and_forgotten(hypervisor: FakeHypervisor, vm: FakeVm, tmp_path: Path) -> None:
    await vm.machine.lose()
    assert (vm.end, await vm.wait()) == (VmEnd.LOST, "QEMU ended with status 1: it said nothing")
    again = await hypervisor.start(vm.machine.spec, nothing)
    await hypervisor.forget(UUID)
    await again.wait()
    assert again.end is VmEnd.KILLED
    await hypervisor.forget(UUID)
    assert hypervisor.forgotten == [UUID, UUID]
