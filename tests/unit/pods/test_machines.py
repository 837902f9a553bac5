from __future__ import annotations

import pytest

from tests.unit.pods.bed import Daemon
from vmruntime.errors import FailedPrecondition, NotFound
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.model.sandbox import SandboxKind
from vmruntime.pods.machines import MachineControl


class FakeVm:
    """Notes what is done to it, or refuses."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.broken = False

    async def pause(self) -> None:
        self._do("pause")

    async def resume(self) -> None:
        self._do("resume")

    async def reset(self) -> None:
        self._do("reset")

    def _do(self, what: str) -> None:
        if self.broken:
            raise HypervisorError("the monitor does not answer")
        self.done.append(what)


async def test_pause_resume_reset(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.context.backends[SandboxKind.IMAGE] = daemon.world.backend
    pod = await daemon.run_pod(kind=SandboxKind.IMAGE)
    control, vm = MachineControl(daemon.context), FakeVm()
    monkeypatch.setattr(daemon.machine(pod), "vm", None, raising=False)
    with pytest.raises(FailedPrecondition, match="the VM of the sandbox .* does not run"):
        await control.pause(pod)
    monkeypatch.setattr(daemon.machine(pod), "vm", vm)
    await control.pause(pod)
    await control.resume(pod)
    await control.reset(pod)
    assert vm.done == ["pause", "resume", "reset"]
    vm.broken = True
    with pytest.raises(HypervisorError, match="does not answer"):
        await control.reset(pod)
    await daemon.pods.stop_sandbox(pod)
    with pytest.raises(FailedPrecondition, match="stopped"):
        await control.resume(pod)
    assert vm.done == ["pause", "resume", "reset"]


async def test_only_image_pods_are_machines(daemon: Daemon, pod: str) -> None:
    control = MachineControl(daemon.context)
    with pytest.raises(FailedPrecondition, match="of the kind container, and only image pods are machines"):
        await control.pause(pod)
    with pytest.raises(NotFound):
        await control.pause("none")
