"""Host pods: containers straight on the host, under the same agent as a plain process.

Everything a pod mounts lies below one small tmpfs (RUN/shares/POD): its layers, its agent's state, its containers' root file
systems. Detaching that takes all of it away, whatever became of the agent.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from vmruntime import tracing
from vmruntime.agent.client import AgentClient
from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.interface import AgentHello, GuestDevice
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.process import last_lines, run
from vmruntime.aio.userns import owner_of
from vmruntime.config.settings import Settings
from vmruntime.errors import FailedPrecondition, Unimplemented
from vmruntime.hypervisor.errors import BootFailed, VmGone
from vmruntime.images.erofs import mount_command
from vmruntime.model.container import Device, Mount
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.resources import LinuxResources, VmSize
from vmruntime.model.sandbox import NamespaceMode, NetworkInterface, Sandbox
from vmruntime.model.stats import HostUsage
from vmruntime.paths import Paths
from vmruntime.sandboxes.cgroup import UNIFIED, cgroup_path, is_hybrid
from vmruntime.sandboxes.host_programs import HostPrograms
from vmruntime.sandboxes.interface import LayerDisk, Published, RecordSerials, VolumeSource, guest_device
from vmruntime.sandboxes.ledger import OwnedResources, process_identity
from vmruntime.volumes.mounting import Flag, detach, map_ids, mount
from vmruntime.volumes.share import open_share, publish, withdraw
from vmruntime.volumes.survey import SharedVolume, host_path, mount_field, shared_volume

log = structlog.get_logger(__name__)

AGENT_ROLE = "agent"
START_TIMEOUT = 20.0
POLL = 0.005
COVER = f"""#!/bin/sh
# crun, in a mount namespace in which version 2 of cgroups is covered.
exec unshare --mount --propagation=unchanged -- /bin/sh -c '
    mount --make-private {UNIFIED} && mount -t tmpfs -o size=1m vmruntime {UNIFIED} && exec "$@"
' crun CRUN "$@"
"""


class HostSandbox:
    """A running agent on the host; implements sandboxes.interface.RunningSandbox."""

    def __init__(
        self, process: DetachedProcess, agent: AgentClient, hello: AgentHello, root: Path, sandbox: Sandbox
    ) -> None:
        self._process = process
        self._agent = agent
        self._hello = hello
        self._layers = root / "layers"
        self._volumes = root / "volumes"
        self._network = _owned_network(sandbox)
        self._mounting = asyncio.Lock()
        self._phases: dict[str, float] = {}

    @property
    def agent(self) -> AgentClient:
        """The pod's agent."""
        return self._agent

    @property
    def hello(self) -> AgentHello:
        """What the agent said when it was first reached."""
        return self._hello

    @property
    def scratch_serial(self) -> str:
        """Empty: writable layers are in a directory of the host's disk."""
        return ""

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds each step of the start took."""
        return self._phases

    @property
    def source(self) -> str:
        """Nowhere: guests of other kinds have no source."""
        return ""

    def facts(self) -> dict[str, str | int | bool]:
        """Return nothing: the sandbox's record has it all."""
        return {}

    @property
    def held(self) -> str:
        """Empty: a process that writes to a full disk is told."""
        return ""

    def layer_name(self, serial: str) -> str:
        """Return where a layer is mounted."""
        return str(self._layers / serial)

    async def attach_nic(self, nic: NetworkInterface, tap_fd: int) -> None:
        """Do nothing: the agent is in the pod's network namespace."""

    async def attach_layers(self, layers: Sequence[LayerDisk]) -> None:
        """Mount layers that are not mounted yet."""
        async with self._mounting:
            for layer in layers:
                target = self._layers / layer.serial
                if not target.is_mount():
                    await _mount_layer(layer.path, target, self._network)

    async def release_layers(self, serials: Sequence[str]) -> None:
        """Do nothing: layers stay until the pod ends."""

    async def publish_volumes(self, container_id: str, mounts: Sequence[Mount]) -> Published:
        """Return the host's paths; a missing one is made a directory. What is to have other ids is bound once more."""
        sources, mapped = await asyncio.to_thread(_sources, list(mounts), self._volumes / container_id)
        if mapped:
            await publish(self._volumes, None, container_id, mapped)
        return Published(sources=sources)

    async def withdraw_volumes(self, container_id: str) -> None:
        """Take away binds with other ids; the container's own mounts go with it."""
        await withdraw(self._volumes, container_id)

    async def attach_devices(self, devices: Sequence[Device], record: RecordSerials) -> list[GuestDevice]:
        """Return the host's devices."""
        return [guest_device(one) for one in devices]

    async def release_devices(self, unused: Callable[[], Sequence[str]]) -> None:
        """Do nothing: they are the host's."""

    async def resize(self, size: VmSize) -> None:
        """Do nothing: there is no machine to resize; limits are those of the containers and of kubelet's cgroup."""

    async def wait(self) -> str:
        """Wait for the agent's end and return why."""
        status = await self._process.wait()
        return "the pod's agent ended" if status in (None, 0) else f"the pod's agent ended with status {status}"

    async def shut_down(self, grace: float) -> None:
        """Let the agent stop its containers, then end it."""
        try:
            await self._agent.shutdown(grace)
            async with asyncio.timeout(grace + 5.0):
                await self._process.wait()
        except (AgentError, TimeoutError) as error:
            log.info("agent did not end by itself", error=str(error))
        await self._process.end()

    async def close(self) -> None:
        """Disconnect; the pod goes on."""
        await self._agent.close()


class HostBackend:
    """Implements sandboxes.interface.SandboxBackend with an agent process a pod."""

    def __init__(self, programs: HostPrograms, owned: OwnedResources, paths: Paths, settings: Settings) -> None:
        self._programs = programs
        self._owned = owned
        self._paths = paths
        self._settings = settings

    def size(self, sandbox: Sandbox, containers: Sequence[LinuxResources] = ()) -> VmSize:
        """Return nothing: a host pod has no machine."""
        return VmSize(vcpus=0, memory_mib=0)

    async def usage(self, sandbox: Sandbox) -> HostUsage:
        """Return what the pod's processes use."""
        return await self._owned.cgroups.usage(self._cgroup(sandbox))

    async def start(self, sandbox: Sandbox) -> HostSandbox:
        """Start the pod's agent; on failure everything it made is released.

        Raises:
            FailedPrecondition: The host lacks something.
            BootFailed: The agent does not answer; the message has its words.
        """
        try:
            return await self._start(sandbox)
        except BaseException:
            await asyncio.shield(self.release(sandbox.id, final=True))
            raise

    async def adopt(self, sandbox: Sandbox) -> HostSandbox:
        """Take over the agent that an earlier daemon started.

        Raises:
            VmGone: It does not run any more.
        """
        for resource in await self._owned.ledger.owned_by(sandbox.id):
            if resource.kind is ResourceKind.PROCESS and resource.data["role"] == AGENT_ROLE:
                process = DetachedProcess(process_identity(resource))
                if not process.alive:
                    raise VmGone("the pod's agent ended while no daemon was running")
                return await self._connect(sandbox, process)
        raise VmGone("its agent was never started")

    async def release(self, sandbox_id: str, *, final: bool) -> None:
        """End the agent and its containers; remove mounts, files and cgroup."""
        await self._owned.release(sandbox_id, keep=frozenset({ResourceKind.NETWORK}), final=final)

    def _cgroup(self, sandbox: Sandbox) -> str:
        return cgroup_path(sandbox.spec.cgroup_parent or self._settings.cgroup_parent, sandbox.id)

    async def _start(self, sandbox: Sandbox) -> HostSandbox:
        began = time.monotonic()
        root, disks = self._paths.share(sandbox.id), self._paths.pod_disks(sandbox.id)
        directory = self._paths.sandbox(sandbox.id)
        cgroup = self._cgroup(sandbox)
        await self._owned.directory(sandbox.id, directory, until_removed=True)
        await self._owned.directory(sandbox.id, disks)
        await self._owned.ledger.record(Resource(owner=sandbox.id, kind=ResourceKind.SHARE, key=str(root)))
        await open_share(root, sandbox.spec.namespaces.user_namespace)
        await asyncio.to_thread(_make_state, root, disks)
        await self._owned.cgroup(sandbox.id, cgroup)
        # Version 2 wants no processes beside the containers' groups.
        await self._owned.cgroups.create(f"{cgroup}/agent")

        async def record(identity: ProcessIdentity) -> None:
            await self._owned.process(sandbox.id, AGENT_ROLE, identity)
            await self._owned.cgroups.add(f"{cgroup}/agent", identity.pid)

        programs = self._programs
        if is_hybrid():
            programs = msgspec.structs.replace(programs, crun=await asyncio.to_thread(_cover_unified, programs, disks))
        process = await DetachedProcess.spawn(
            agent_argv(programs, sandbox, root, self._socket(sandbox), cgroup),
            record=record,
            log=directory / "agent.log",
        )
        running = await self._connect(sandbox, process)
        running.phases["agent"] = (time.monotonic() - began) * 1000
        return running

    @tracing.timed("host.agent")
    async def _connect(self, sandbox: Sandbox, process: DetachedProcess) -> HostSandbox:
        socket = self._socket(sandbox)
        deadline = time.monotonic() + START_TIMEOUT
        while not socket.is_socket():
            if not process.alive or time.monotonic() > deadline:
                said = self._paths.sandbox(sandbox.id) / "agent.log"
                words = said.read_text(errors="replace")[-600:].strip() if said.exists() else "it said nothing"
                raise BootFailed(f"the pod's agent did not start: {words}")
            await asyncio.sleep(POLL)
        agent = AgentClient(socket)
        try:
            return HostSandbox(process, agent, await agent.hello(), self._paths.share(sandbox.id), sandbox)
        except BaseException as error:
            await agent.close()
            if isinstance(error, AgentGone):
                raise VmGone(f"the pod's agent does not answer: {error.message}") from error
            raise

    def _socket(self, sandbox: Sandbox) -> Path:
        return self._paths.sandbox(sandbox.id) / "agent.sock"


def agent_argv(programs: HostPrograms, sandbox: Sandbox, root: Path, socket: Path, cgroup: str) -> list[str]:
    """Return the command that runs a pod's agent in the pod's namespaces.

    Network and IPC are the pod's unless it asks for the host's; the UTS namespace is always its own, so that a container
    that sets its host name does not rename the node.
    """
    namespaces = sandbox.spec.namespaces
    argv = []
    if namespaces.network is not NamespaceMode.NODE and sandbox.network is not None:
        argv += ["nsenter", f"--net={sandbox.network.netns}", "--"]
    argv += ["unshare", "--uts", *(() if namespaces.ipc is NamespaceMode.NODE else ("--ipc",)), "--"]
    name = sandbox.spec.hostname or os.uname().nodename
    argv += ["/bin/sh", "-c", 'hostname "$0" && exec "$@"', name]
    argv += [programs.agent, "--listen", f"unix:{socket}", "--state-dir", str(root / "agent")]
    return [*argv, "--crun", programs.crun, "--cgroup", cgroup]


def _make_state(root: Path, disks: Path) -> None:
    """Make the agent's directory, with its writable layers on the host's disk."""
    scratch, target = disks / "scratch", root / "agent" / "scratch"
    scratch.mkdir(mode=0o711, exist_ok=True)
    target.mkdir(mode=0o711, parents=True, exist_ok=True)
    (root / "layers").mkdir(exist_ok=True)
    # Like the share itself: whoever may enter that may enter this.
    volumes = root / "volumes"
    volumes.mkdir(exist_ok=True)
    os.chown(volumes, -1, root.stat().st_gid)
    volumes.chmod(root.stat().st_mode & 0o777)
    try:
        mount(str(scratch), target, flags=Flag.BIND)
    except OSError as error:
        raise FailedPrecondition(f"{scratch} cannot be bound to {target}: {error.strerror}") from error


def _cover_unified(programs: HostPrograms, disks: Path) -> str:
    """Return a crun for hosts with both versions of cgroups, where it refuses to work once version 2 has a controller.

    Each call of it has a mount namespace of its own, whose other mounts propagate as the host's do.
    """
    wrapper = disks / "crun"
    wrapper.write_text(COVER.replace("CRUN", programs.crun))
    wrapper.chmod(0o700)
    return str(wrapper)


def _owned_network(sandbox: Sandbox) -> Path | None:
    """Return the network namespace that the pod's user namespace owns; None: it has no user namespace of its own."""
    if sandbox.spec.namespaces.user_namespace is None or sandbox.network is None:
        return None
    return Path(sandbox.network.netns)


@tracing.timed("host.mount_layer")
async def _mount_layer(image: Path, target: Path, network: Path | None) -> None:
    """Mount a layer; its files belong to the ids of the user namespace that owns `network`, if there is one."""
    target.mkdir(exist_ok=True)
    done = await run(mount_command(image, target), awaited=True)
    if done.returncode != 0:
        target.rmdir()
        raise FailedPrecondition(
            f"the layer {image.name} cannot be mounted on the host: {last_lines(done.stderr)}",
            remedy="host pods need the kernel's erofs and loop modules (vmruntime doctor)",
        )
    if network is None:
        return
    try:
        await asyncio.to_thread(_map_layer, target, network)
    except OSError as error:
        await asyncio.to_thread(detach, target)
        target.rmdir()
        raise FailedPrecondition(
            f"the layer {image.name} cannot be mapped into the pod's user namespace: {error.strerror}",
            remedy="user namespaces on the host need Linux 5.19 or later",
        ) from error


def _map_layer(target: Path, network: Path) -> None:
    with owner_of(network) as ids:
        map_ids(target, ids)


def _sources(mounts: list[Mount], directory: Path) -> tuple[list[VolumeSource], list[SharedVolume]]:
    """Return where each mount's files are; those that are to have other ids are in a directory by number."""
    sources: list[VolumeSource] = []
    mapped: list[SharedVolume] = []
    for number, one in enumerate(mounts):
        if one.image:
            continue
        field = mount_field(number, one)
        path = host_path(field, one)
        if one.ids is not None:
            if one.propagation == "rshared":
                raise Unimplemented(
                    f"{field}.propagation: PROPAGATION_BIDIRECTIONAL for {one.container_path!r}, whose ids are mapped:"
                    " mounts made in it cannot appear on the host",
                    remedy="use HostToContainer, or leave out hostUsers: false",
                )
            mapped.append(shared_volume(field, one, path))
            path = str(directory / str(len(mapped) - 1))
        sources.append(VolumeSource(mount=one, source=path, readonly=one.readonly, propagation=one.propagation))
    return sources, mapped
