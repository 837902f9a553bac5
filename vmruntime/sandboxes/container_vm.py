"""Container pods: a minimal kernel and our agent in a VM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog

from vmruntime import tracing
from vmruntime.agent.client import AgentClient
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.interface import AGENT_PORT, AgentHello, GuestDevice
from vmruntime.agent.relay import Dialer, HybridDialer, Relay, VsockDialer
from vmruntime.aio.detached import ProcessIdentity
from vmruntime.config.settings import Settings
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.errors import BootFailed, VmGone, VmHeld
from vmruntime.hypervisor.interface import (
    Disk,
    Hypervisor,
    KernelBoot,
    Nic,
    VirtualMachine,
    VmHandle,
    VmSpec,
)
from vmruntime.hypervisor.vsock import hybrid_socket
from vmruntime.model.container import Device, Mount
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import LinuxResources, VmSize
from vmruntime.model.sandbox import NetworkInterface, Sandbox
from vmruntime.model.stats import HostUsage
from vmruntime.paths import Paths
from vmruntime.sandboxes import scratch
from vmruntime.sandboxes.guest_answers import console_words, dial_until_answer, until_not_held, why_silent
from vmruntime.sandboxes.interface import LayerDisk, Published, RecordSerials, guest_device
from vmruntime.sandboxes.ledger import OwnedResources, process_identity
from vmruntime.sandboxes.placement import choose_cgroup, recorder
from vmruntime.sandboxes.size import size_for
from vmruntime.sandboxes.vm_devices import as_attached, block_disk
from vmruntime.sandboxes.vm_volumes import SHARE_ROLE, VmVolumes

log = structlog.get_logger(__name__)

READY_LINE = "vmruntime-agent: ready"
ADOPT_TIMEOUT = 10.0
BOOTS_PER_PROCESSOR = 4
"""More at once would not be up sooner, and a node that starts all its pods would run each of them into boot_timeout."""
HELPER_ROLES = ("vsock", SHARE_ROLE)


class ContainerVm:
    """A booted guest with its agent; implements sandboxes.interface.RunningSandbox."""

    def __init__(
        self,
        vm: VirtualMachine,
        relay: Relay,
        agent: AgentClient,
        hello: AgentHello,
        *,
        volumes: VmVolumes,
        phases: dict[str, float],
        attached: set[str],
    ) -> None:
        self._vm = vm
        self._relay = relay
        self._agent = agent
        self._hello = hello
        self._volumes = volumes
        self._phases = phases
        self._attached = attached
        self._attaching = asyncio.Lock()

    @property
    def agent(self) -> AgentClient:
        """The agent in the guest."""
        return self._agent

    @property
    def hello(self) -> AgentHello:
        """What the agent said when it was first reached."""
        return self._hello

    @property
    def scratch_serial(self) -> str:
        """Serial of the writable disk."""
        return scratch.SERIAL

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds: vsock and QEMU until the monitor answers, then until the agent answers."""
        return self._phases

    def facts(self) -> dict[str, str | int | bool]:
        """Return why the VM is held, if it is: the sandbox's record has all the rest."""
        return {"held": self.held} if self.held else {}

    @property
    def held(self) -> str:
        """Why the guest does not run."""
        return self._vm.held

    def layer_name(self, serial: str) -> str:
        """Return a layer's serial, by which the guest finds its disk."""
        return serial

    async def attach_nic(self, nic: NetworkInterface, tap_fd: int) -> None:
        """Give the guest a NIC with the MAC that CNI chose, or one that is given it in the guest."""
        await self._vm.attach_nic(Nic(id=nic.name, mac=nic.device_mac or nic.mac), tap_fd)

    async def attach_layers(self, layers: Sequence[LayerDisk]) -> None:
        """Hot-plug the layers that the guest does not have yet."""
        async with self._attaching:
            for layer in layers:
                if layer.serial not in self._attached:
                    await self._vm.attach_disk(Disk(path=layer.path, serial=layer.serial, readonly=True))
                    self._attached.add(layer.serial)

    async def release_layers(self, serials: Sequence[str]) -> None:
        """Unplug layers."""
        async with self._attaching:
            await self._detach(serials)

    async def _detach(self, serials: Sequence[str]) -> None:
        for serial in serials:
            if serial in self._attached:
                await self._vm.detach_disk(serial)
                self._attached.discard(serial)

    async def publish_volumes(self, container_id: str, mounts: Sequence[Mount]) -> Published:
        """Make a container's mounts visible in the guest."""
        return await self._volumes.publish(container_id, mounts)

    async def withdraw_volumes(self, container_id: str) -> None:
        """Take away a container's mounts."""
        await self._volumes.withdraw(container_id)

    async def attach_devices(self, devices: Sequence[Device], record: RecordSerials) -> list[GuestDevice]:
        """Hot-plug block devices as disks; other devices are the guest's own of the same path."""
        wanted = [(device, await asyncio.to_thread(block_disk, device)) for device in devices]
        async with self._attaching:
            disks: dict[str, Disk] = {}
            found = []
            for device, first in wanted:
                disk = as_attached(device, first, self._attached | disks.keys()) if first else None
                if disk is not None:
                    disks[disk.serial] = disk
                found.append(guest_device(device, disk.serial if disk else ""))
            if disks:
                await record(list(disks))
            for serial in disks.keys() - self._attached:
                await self._vm.attach_disk(disks[serial])
                self._attached.add(serial)
        return found

    async def release_devices(self, unused: Callable[[], Sequence[str]]) -> None:
        """Unplug block devices."""
        async with self._attaching:
            await self._detach(unused())

    async def resize(self, size: VmSize) -> None:
        """Plug in processors and memory, and have the guest use them."""
        await self._vm.resize(size)
        await self._agent.online_cpus(size.vcpus)

    async def wait(self) -> str:
        """Wait for the VM's end and return why."""
        return await self._vm.wait()

    async def shut_down(self, grace: float) -> None:
        """Let the guest power off, then end what is left of the VM."""
        try:
            await self._agent.shutdown(grace)
            async with asyncio.timeout(grace + 5.0):
                await self._vm.wait()
        except (AgentError, TimeoutError) as error:
            log.info("guest did not power off by itself", error=str(error))
        await self._vm.kill()

    async def close(self) -> None:
        """Disconnect; the VM goes on."""
        await self._agent.close()
        await self._relay.close()
        await self._vm.close()


class ContainerVmBackend:
    """Implements sandboxes.interface.SandboxBackend with a VM a pod."""

    def __init__(
        self, hypervisor: Hypervisor, owned: OwnedResources, paths: Paths, settings: Settings, host_memory_mib: int
    ) -> None:
        self._hypervisor = hypervisor
        self._owned = owned
        self._paths = paths
        self._settings = settings
        self._host_memory_mib = host_memory_mib
        self._booting = asyncio.Semaphore(BOOTS_PER_PROCESSOR * (os.cpu_count() or 1))

    def size(self, sandbox: Sandbox, containers: Sequence[LinuxResources] = ()) -> VmSize:
        """Return the size that the sandbox's VM needs."""
        return size_for(sandbox.spec, containers, self._settings.guest, self._host_memory_mib)

    async def usage(self, sandbox: Sandbox) -> HostUsage:
        """Return what the VM and its helpers use on the host."""
        return await self._owned.cgroups.usage(await self._owned.cgroup_of(sandbox.id))

    async def start(self, sandbox: Sandbox) -> ContainerVm:
        """Boot a guest and wait for its agent; on failure everything it made is released.

        Raises:
            BootFailed: The guest did not come up; the message has the end of its console.
            FailedPrecondition: There is no guest to boot.
        """
        try:
            return await self._start(sandbox)
        except BaseException:
            await asyncio.shield(self.release(sandbox.id, final=True))
            raise

    async def adopt(self, sandbox: Sandbox) -> ContainerVm:
        """Take over a VM that an earlier daemon started.

        Raises:
            VmGone: It does not run any more.
            VmHeld: It does, and cannot be talked to yet.
        """
        vm = await self._hypervisor.adopt(await self._handle(sandbox.id))
        await until_not_held(vm)
        try:
            return await self._connect(sandbox, vm, dial_until_answer, ADOPT_TIMEOUT, {})
        except BootFailed as error:
            if vm.held:
                raise VmHeld(vm.held) from error
            await vm.kill()
            raise VmGone(f"its agent does not answer any more: {error}") from error

    async def release(self, sandbox_id: str, *, final: bool) -> None:
        """End the VM and remove its disks, cgroup and CID; with `final`, its console and logs too."""
        await self._owned.release(sandbox_id, keep=frozenset({ResourceKind.NETWORK}), final=final)

    async def _prepare(self, sandbox: Sandbox) -> VmSpec:
        """Make what the VM needs on the host and describe the VM."""
        guest = self._settings.guest_directory
        kernel, initramfs = guest / "vmlinuz", guest / "initramfs.img"
        for file in (kernel, initramfs):
            if not file.is_file():
                raise FailedPrecondition(f"there is no guest to boot: {file} is missing", remedy="make guest")
        size = self.size(sandbox)
        directory, disks = self._paths.sandbox(sandbox.id), self._paths.pod_disks(sandbox.id)
        cgroup = await choose_cgroup(self._owned, sandbox, size, self._settings.cgroup_parent)
        await self._owned.cgroup(sandbox.id, cgroup)
        await self._owned.directory(sandbox.id, directory, 0o711, until_removed=True)
        await self._owned.directory(sandbox.id, disks)
        scratch_path = disks / "scratch.img"
        await scratch.make_scratch(scratch_path, self._settings.guest.scratch_gib)
        return VmSpec(
            id=sandbox.id,
            size=size,
            boot=KernelBoot(kernel=kernel, initramfs=initramfs, arguments=self._settings.guest.kernel_args),
            directory=directory,
            cid=await self._owned.ledger.allocate_cid(sandbox.id),
            disks=[Disk(path=scratch_path, serial=scratch.SERIAL, readonly=False)],
        )

    async def _start(self, sandbox: Sandbox) -> ContainerVm:
        began = time.monotonic()
        with tracing.span("vm.prepare"):
            spec = await self._prepare(sandbox)
        phases = {"prepare": (time.monotonic() - began) * 1000}
        async with self._booting:
            return await self._boot(sandbox, spec, phases)

    async def _boot(self, sandbox: Sandbox, spec: VmSpec, phases: dict[str, float]) -> ContainerVm:
        began = time.monotonic()
        with tracing.span("vm.qemu"):
            vm = await self._hypervisor.start(spec, recorder(self._owned, sandbox.id))
        phases["qemu"] = (time.monotonic() - began) * 1000

        async def booted(dialer: Dialer) -> None:
            await vm.wait_for_console(READY_LINE)
            await dial_until_answer(dialer)

        with tracing.span("vm.agent"):
            return await self._connect(sandbox, vm, booted, self._settings.hypervisor.boot_timeout, phases)

    async def _connect(
        self,
        sandbox: Sandbox,
        vm: VirtualMachine,
        answering: Callable[[Dialer], Awaitable[None]],
        timeout: float,
        phases: dict[str, float],
    ) -> ContainerVm:
        """Wait for the agent and connect to it; the VM is let go of when that fails.

        A booting guest is dialled only when its console says that the agent listens: vhost-device-vsock 0.3 can lose
        its way over connections that are made, and given up, before the guest's driver is there.
        """
        began = time.monotonic()
        dialer = self._dialer(vm.handle)
        relay = Relay(Path(vm.handle.directory) / "agent.sock", dialer)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(vm.close)
            undo.push_async_callback(relay.close)
            try:
                await self._wait_for_agent(vm, answering(dialer), timeout)
                await relay.open()
                agent = AgentClient(Path(vm.handle.directory) / "agent.sock")
                undo.push_async_callback(agent.close)
                hello = await agent.hello()
                attached = await vm.attached_disks()
            except AgentGone as error:  # asked now: a VM that is closed notices no end any more
                raise BootFailed(
                    f"the guest did not come up: {await why_silent(vm, error)}{console_words(vm)}"
                ) from error
            undo.pop_all()
        phases["guest"] = (time.monotonic() - began) * 1000
        volumes = self._volumes(vm, sandbox)
        return ContainerVm(vm, relay, agent, hello, volumes=volumes, phases=phases, attached=attached)

    def _volumes(self, vm: VirtualMachine, sandbox: Sandbox) -> VmVolumes:
        root, program = self._paths.share(sandbox.id), self._settings.volumes.virtiofsd
        return VmVolumes(sandbox, vm, self._owned, root, program, recorder(self._owned, sandbox.id))

    async def _wait_for_agent(self, vm: VirtualMachine, answering: Awaitable[None], timeout: float) -> None:
        ended = asyncio.ensure_future(vm.wait())
        answered = asyncio.ensure_future(answering)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wait({ended, answered}, return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise BootFailed(f"the guest did not come up: {ended.result()}{console_words(vm)}")
            answered.result()
        except TimeoutError:
            raise BootFailed(
                f"the guest's agent did not answer within {timeout:g} s{console_words(vm)}",
                remedy="hypervisor.boot_timeout allows longer; vmruntime doctor checks the guest's files",
            ) from None
        finally:
            for task in (ended, answered):
                task.cancel()
            await asyncio.wait({ended, answered})

    def _dialer(self, handle: VmHandle) -> Dialer:
        if handle.vsock:
            return HybridDialer(Path(handle.vsock), AGENT_PORT)
        return VsockDialer(handle.cid, AGENT_PORT)

    async def _handle(self, sandbox_id: str) -> VmHandle:
        """Put together, from the ledger, what the hypervisor needs to find a VM again."""
        processes: dict[str, ProcessIdentity] = {}
        cid = 0
        for resource in await self._owned.ledger.owned_by(sandbox_id):
            if resource.kind is ResourceKind.PROCESS:
                processes[resource.data["role"]] = process_identity(resource)
            elif resource.kind is ResourceKind.CID:
                cid = int(resource.key)
        if "qemu" not in processes:
            raise VmGone("its VM was never started")
        directory = self._paths.sandbox(sandbox_id)
        helpers = [processes[role] for role in HELPER_ROLES if role in processes]
        return VmHandle(
            id=sandbox_id,
            driver="qemu",
            process=processes["qemu"],
            helpers=helpers,
            directory=str(directory),
            cid=cid,
            vsock=str(hybrid_socket(directory)) if "vsock" in processes else "",
        )
