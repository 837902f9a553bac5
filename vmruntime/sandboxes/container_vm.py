"""Container pods: a minimal kernel and our agent in a VM."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from vmruntime import tracing
from vmruntime.agent.client import AgentClient
from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import AgentHello, GuestDevice
from vmruntime.aio.beside import together
from vmruntime.aio.detached import ProcessIdentity
from vmruntime.config.settings import Settings
from vmruntime.errors import VmruntimeError
from vmruntime.hypervisor.errors import BootFailed, VmGone, VmHeld
from vmruntime.hypervisor.interface import Disk, Hypervisor, Nic, VirtualMachine, VmHandle
from vmruntime.hypervisor.vsock import hybrid_socket
from vmruntime.ids import new_id
from vmruntime.model.container import Device, Mount
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import LinuxResources, VmSize
from vmruntime.model.sandbox import NetworkInterface, Sandbox, SandboxSpec
from vmruntime.model.stats import HostUsage
from vmruntime.network.tap import SpareTap
from vmruntime.paths import Paths
from vmruntime.sandboxes import scratch
from vmruntime.sandboxes.guest_answers import until_not_held
from vmruntime.sandboxes.interface import LayerDisk, Published, RecordSerials, guest_device
from vmruntime.sandboxes.ledger import OwnedResources, process_identity
from vmruntime.sandboxes.placement import choose_cgroup, recorder
from vmruntime.sandboxes.size import size_for, usual_size
from vmruntime.sandboxes.sources.guest import Guest, reach
from vmruntime.sandboxes.sources.service import GuestSources
from vmruntime.sandboxes.sources.template import template_size
from vmruntime.sandboxes.vm_devices import as_attached, block_disk
from vmruntime.sandboxes.vm_volumes import SHARE_ROLE, VmVolumes, may_share

log = structlog.get_logger(__name__)

ADOPT_TIMEOUT = 10.0
HELPER_ROLES = ("vsock", SHARE_ROLE)


class ContainerVm:
    """A booted guest with its agent; implements sandboxes.interface.RunningSandbox."""

    def __init__(self, guest: Guest, volumes: VmVolumes) -> None:
        self._guest = guest
        self._vm = guest.vm
        self._agent = guest.agent
        self._volumes = volumes
        self._attached = guest.attached
        self._attaching = asyncio.Lock()

    @property
    def agent(self) -> AgentClient:
        """The agent in the guest."""
        return self._agent

    @property
    def hello(self) -> AgentHello:
        """What the agent said when it was first reached."""
        return self._guest.hello

    @property
    def scratch_serial(self) -> str:
        """Serial of the writable disk."""
        return scratch.SERIAL

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds that each step of the guest's source took."""
        return self._guest.phases

    @property
    def source(self) -> str:
        """Where the guest came from."""
        return self._guest.source

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
        """Hot-plug the layers that the guest does not have yet, all at once."""

        async def attach(layer: LayerDisk) -> None:
            await self._vm.attach_disk(Disk(path=layer.path, serial=layer.serial, readonly=True))
            self._attached.add(layer.serial)

        async with self._attaching:
            missing = {layer.serial: layer for layer in layers if layer.serial not in self._attached}
            await together(*(attach(layer) for layer in missing.values()))

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
        await self._guest.close()


class ContainerVmBackend:
    """Implements sandboxes.interface.SandboxBackend with a VM a pod."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        owned: OwnedResources,
        paths: Paths,
        settings: Settings,
        host_memory_mib: int,
        *,
        new_id: Callable[[], str] = new_id,
        new_tap: Callable[[], Awaitable[SpareTap]] | None = None,
        rehearsal: bytes = b"",
        can_share_memory: bool = False,
    ) -> None:
        """Start nothing yet; see GuestSources for the arguments."""
        self._hypervisor = hypervisor
        self._owned = owned
        self._paths = paths
        self._settings = settings
        self._host_memory_mib = host_memory_mib
        self._taps: dict[str, SpareTap] = {}
        self._sources = GuestSources(
            hypervisor,
            owned,
            paths,
            settings,
            host_memory_mib,
            usual_size(settings.guest, host_memory_mib),
            new_id=new_id,
            new_tap=new_tap,
            rehearsal=rehearsal,
            can_share_memory=can_share_memory,
        )

    async def open(self) -> None:
        """Begin to make templates and warm VMs, in the background."""
        await self._sources.open()

    async def close(self) -> None:
        """End what waits for pods."""
        await self._sources.close()

    def start_state(self) -> dict[str, object]:
        """Return which templates and warm VMs there are, for people."""
        return self._sources.state()

    def claim(self, spec: SandboxSpec) -> str | None:
        """Return the id of a warm VM that a pod is to have; None: none waits.

        Raises:
            InvalidArgument: This host could never hold the pod.
        """
        return self._sources.claim(size_for(spec, (), self._settings.guest, self._host_memory_mib))

    async def tap(self, sandbox_id: str) -> SpareTap | None:
        """Return the tap that the sandbox's first NIC is on, or will be after start(); it is the caller's to close."""
        tap = await self._sources.tap(sandbox_id)
        if tap is not None:
            self._taps[sandbox_id] = tap
        return tap

    async def drop(self, sandbox_id: str) -> None:
        """Let go of what claim() and tap() kept for a sandbox that does not start; nothing: success."""
        self._taps.pop(sandbox_id, None)
        await self._sources.drop(sandbox_id)

    def size(self, sandbox: Sandbox, containers: Sequence[LinuxResources] = ()) -> VmSize:
        """Return the size that the sandbox's VM needs."""
        return size_for(sandbox.spec, containers, self._settings.guest, self._host_memory_mib)

    async def usage(self, sandbox: Sandbox) -> HostUsage:
        """Return what the VM and its helpers use on the host."""
        return await self._owned.cgroups.usage(await self._owned.cgroup_of(sandbox.id))

    async def start(self, sandbox: Sandbox) -> ContainerVm:
        """Get a guest and wait for its agent; on failure everything it made is released.

        Raises:
            BootFailed: The guest did not come up; the message has the end of its console.
            FailedPrecondition: There is no guest to boot.
        """
        try:
            return await self._start(sandbox, self._taps.pop(sandbox.id, None))
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
            return self._vm(sandbox, await reach(vm, "", ADOPT_TIMEOUT, {}))
        except BootFailed as error:
            if vm.held:
                raise VmHeld(vm.held) from error
            await vm.kill()
            raise VmGone(f"its agent does not answer any more: {error}") from error

    async def release(self, sandbox_id: str, *, final: bool) -> None:
        """End the VM and remove its disks, cgroup and CID; with `final`, its console and logs too."""
        await self._owned.release(sandbox_id, keep=frozenset({ResourceKind.NETWORK}), final=final)

    async def _start(self, sandbox: Sandbox, tap: SpareTap | None) -> ContainerVm:
        size = self.size(sandbox)
        cgroup = await choose_cgroup(self._owned, sandbox, size, self._settings.cgroup_parent)
        shares = may_share(sandbox.spec)
        guest = await self._sources.guest(sandbox.id, size, cgroup, tap, shares=shares)
        running = self._vm(sandbox, guest)
        try:
            await self._grow(running, size)
        except VmruntimeError as error:
            await running.close()
            log.warning("the guest boots: one of a template cannot grow", sandbox=sandbox.id, why=str(error))
            return self._vm(sandbox, await self._sources.boot(sandbox.id, size, cgroup, tap))
        except BaseException:
            await running.close()
            raise
        return running

    async def _grow(self, running: ContainerVm, size: VmSize) -> None:
        """Make a guest that is of a template as large as its pod needs; one that has booted is."""
        base = template_size(size)
        if running.source != "cold" and base != size:
            with tracing.span("vm.resize"):
                await running.resize(size)

    def _vm(self, sandbox: Sandbox, guest: Guest) -> ContainerVm:
        return ContainerVm(guest, self._volumes(guest.vm, sandbox))

    def _volumes(self, vm: VirtualMachine, sandbox: Sandbox) -> VmVolumes:
        root, program = self._paths.share(sandbox.id), self._settings.volumes.virtiofsd
        return VmVolumes(sandbox, vm, self._owned, root, program, recorder(self._owned, sandbox.id))

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
