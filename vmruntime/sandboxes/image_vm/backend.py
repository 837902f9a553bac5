"""Makes image pods."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path

import structlog

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import VmruntimeError
from vmruntime.hypervisor.errors import VmGone
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import LinuxResources, VmSize
from vmruntime.model.sandbox import Sandbox
from vmruntime.model.stats import HostUsage
from vmruntime.sandboxes.image_vm.agent import ImageAgent
from vmruntime.sandboxes.image_vm.boot import image_pod
from vmruntime.sandboxes.image_vm.machine import ImageMachine
from vmruntime.sandboxes.image_vm.parts import MachineParts
from vmruntime.sandboxes.image_vm.prepare import Account, Definer
from vmruntime.sandboxes.image_vm.sandbox import ImageSandbox
from vmruntime.sandboxes.placement import choose_cgroup
from vmruntime.sandboxes.size import image_size_for

log = structlog.get_logger(__name__)


class ImageVmBackend:
    """Implements sandboxes.interface.SandboxBackend for pods of kind image."""

    def __init__(self, parts: MachineParts, host_memory_mib: int) -> None:
        self._parts = parts
        self._host_memory_mib = host_memory_mib

    @property
    def driver(self) -> str:
        """Name of the hypervisor that machines are started with."""
        return self._parts.driver

    def size(self, sandbox: Sandbox, containers: Sequence[LinuxResources] = ()) -> VmSize:
        """Return the size of the pod's machine: what its limits say, since the guest is all there is to limit."""
        vcpus = image_pod(sandbox).vcpus
        return image_size_for(sandbox.spec, containers, vcpus, self._parts.settings.guest, self._host_memory_mib)

    async def usage(self, sandbox: Sandbox) -> HostUsage:
        """Return what the VM and its helpers use on the host."""
        owned = self._parts.owned
        return await owned.cgroups.usage(await owned.cgroup_of(sandbox.id))

    async def start(self, sandbox: Sandbox) -> ImageSandbox:
        """Make the pod's directories and cgroup; on failure nothing of them stays."""
        try:
            parts, size = self._parts, self.size(sandbox)
            cgroup = await choose_cgroup(parts.owned, sandbox, size, parts.settings.cgroup_parent)
            await parts.owned.cgroup(sandbox.id, cgroup)
            await parts.owned.directory(sandbox.id, parts.paths.sandbox(sandbox.id), 0o711, until_removed=True)
            await parts.owned.directory(sandbox.id, parts.paths.pod_disks(sandbox.id), 0o711, until_removed=True)
            return await self._sandbox(sandbox)
        except BaseException:
            await asyncio.shield(self.release(sandbox.id, final=True))
            raise

    async def adopt(self, sandbox: Sandbox) -> ImageSandbox:
        """Take over a pod of an earlier daemon, with its machine if that runs.

        Raises:
            VmGone: The pod's network is no more.
        """
        network = sandbox.network
        if network is not None and not await in_thread(lambda: Path(network.netns).exists()):
            raise VmGone("its network namespace is gone: the host was started anew")
        running = await self._sandbox(sandbox)
        try:
            await running.machine.adopt()
        except BaseException:
            await running.close()
            raise
        return running

    async def release(self, sandbox_id: str, *, final: bool) -> None:
        """End the VM and remove what the pod has; with `final`, its disk, console and logs too."""
        await self._parts.owned.release(sandbox_id, keep=frozenset({ResourceKind.NETWORK}), final=final)

    async def sweep(self, known: Collection[str]) -> None:
        """End machines that no sandbox has; they were started by a daemon that died before it could write that down."""
        for name, hypervisor in self._parts.hypervisors.items():
            try:
                for owner in await hypervisor.sweep(known):
                    log.warning("a machine that nobody owned was ended", owner=owner)
            except VmruntimeError as error:
                log.warning("machines that nobody owns are not looked for", driver=name, error=str(error))

    async def _sandbox(self, sandbox: Sandbox) -> ImageSandbox:
        machine = ImageMachine(sandbox, self._parts)
        account = Account.of(self._parts.settings.hypervisor.user)
        definer = Definer(sandbox, machine.directory, machine.disks, account)
        agent = ImageAgent(machine, definer)
        return ImageSandbox(machine, agent, await agent.hello())
