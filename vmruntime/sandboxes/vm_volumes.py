"""Volumes of a container VM: one virtio-fs share a pod, made when the first container needs it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from vmruntime.agent.interface import GuestMemoryVolume
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.errors import InvalidArgument
from vmruntime.hypervisor.interface import VirtualMachine
from vmruntime.model.container import Mount
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Sandbox, SandboxSpec
from vmruntime.sandboxes.interface import Published, VolumeSource
from vmruntime.sandboxes.ledger import OwnedResources, process_identity
from vmruntime.volumes.share import close_share, open_share, publish, seal, withdraw
from vmruntime.volumes.survey import MemoryVolume, SharedVolume, Volume, survey
from vmruntime.volumes.virtiofsd import find_virtiofsd, is_rust, virtiofsd_argv

SHARE_TAG = "vmruntime"
SHARE_ROLE = "share"
SHARE_ANNOTATION = "vmruntime.io/share"

Recorder = Callable[[str, ProcessIdentity], Awaitable[None]]


class VmVolumes:
    """What one VM sees of the host's files."""

    def __init__(
        self, sandbox: Sandbox, vm: VirtualMachine, owned: OwnedResources, root: Path, program: str, record: Recorder
    ) -> None:
        """Start with nothing.

        Args:
            sandbox: The owner in the ledger.
            vm: The VM that gets the share.
            owned: The ledger.
            root: The share's directory on the host.
            program: The setting volumes.virtiofsd.
            record: Told of virtiofsd before it runs.
        """
        self._sandbox = sandbox
        self._vm = vm
        self._owned = owned
        self._root = root
        self._program = program
        self._record = record
        self._server: DetachedProcess | None = None
        self._making = asyncio.Lock()

    async def publish(self, container_id: str, mounts: Sequence[Mount]) -> Published:
        """Make a container's mounts visible in the guest; on failure nothing of them stays."""
        if not mounts:
            return Published()
        volumes = await asyncio.to_thread(survey, mounts)
        shared = [volume for volume in volumes if isinstance(volume, SharedVolume)]
        if shared and not may_share(self._sandbox.spec):
            raise InvalidArgument.field(
                "config.mounts[].host_path",
                shared[0].mount.host_path,
                f"is a file of the host, and the pod's annotation {SHARE_ANNOTATION} says that it mounts none",
                remedy="leave the annotation out",
            )
        if shared:
            await publish(self._root, await self._make_share(), container_id, shared)
        return Published(
            sources=_sources(volumes, container_id),
            share_tag=SHARE_TAG if shared else "",
            memory=_memory(volumes),
        )

    async def withdraw(self, container_id: str) -> None:
        """Take away a container's mounts; unknown: success."""
        await withdraw(self._root, container_id)

    async def _make_share(self) -> DetachedProcess:
        """Return the running virtiofsd of the VM's share, both made if need be."""
        async with self._making:
            server = await self._running_server()
            if server is not None and self._root.is_mount() and await self._vm.has_share():
                return server
            if server is not None:  # a daemon that died in between left it, and no VM has it
                await server.end()
            await self._owned.ledger.record(
                Resource(owner=self._sandbox.id, kind=ResourceKind.SHARE, key=str(self._root))
            )
            await open_share(self._root, self._sandbox.spec.namespaces.user_namespace)
            self._server = await self._attach()
            return self._server

    async def _running_server(self) -> DetachedProcess | None:
        """Return the virtiofsd that this daemon, or an earlier one, started."""
        if self._server is None:
            for resource in await self._owned.ledger.owned_by(self._sandbox.id):
                if resource.kind is ResourceKind.PROCESS and resource.data["role"] == SHARE_ROLE:
                    process = DetachedProcess(process_identity(resource))
                    if process.alive:
                        self._server = process
        return self._server

    async def _attach(self) -> DetachedProcess:
        """Start virtiofsd, plug its device in, and return it."""
        program = find_virtiofsd(self._program)
        rust = await is_rust(program)
        directory = Path(self._vm.handle.directory)
        with contextlib.ExitStack() as sockets:
            path = directory / "share.sock"
            path.unlink(missing_ok=True)
            server = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            server.bind(str(path))
            path.chmod(0o600)
            server.listen(1)
            process = await DetachedProcess.spawn(
                virtiofsd_argv(program, rust=rust, root=self._root, fd=server.fileno()),
                record=lambda identity: self._record(SHARE_ROLE, identity),
                log=directory / "virtiofsd.log",
                pass_fds=[server.fileno()],
            )
            try:
                connection = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                connection.connect(str(path))  # a unix socket connects at once: it listens already
                await seal(self._root, process)
                await self._vm.attach_share(SHARE_TAG, connection.fileno(), process.identity)
                return process
            except BaseException:
                await process.end()
                raise
            finally:
                path.unlink(missing_ok=True)


def may_share(spec: SandboxSpec) -> bool:
    """Return whether a pod may mount files of the host; one that does not may share a template's memory."""
    return spec.annotations.get(SHARE_ANNOTATION) != "none"


async def release_share(resource: Resource) -> None:
    """Release a share named by the ledger."""
    await close_share(Path(resource.key))


def _sources(volumes: list[Volume], container_id: str) -> list[VolumeSource]:
    sources, number = [], 0
    for volume in volumes:
        if isinstance(volume, MemoryVolume):
            name = f"memory:{volume.key}/{volume.sub_path}".rstrip("/")
            sources.append(VolumeSource(mount=volume.mount, source=name, readonly=volume.mount.readonly))
        else:
            name = f"share:{container_id}/{number}"
            sources.append(VolumeSource(mount=volume.mount, source=name, readonly=volume.guest_readonly))
            number += 1
    return sources


def _memory(volumes: list[Volume]) -> list[GuestMemoryVolume]:
    found = {volume.key: volume for volume in volumes if isinstance(volume, MemoryVolume)}
    return [
        GuestMemoryVolume(key=one.key, size=one.size, uid=one.uid, gid=one.gid, mode=one.mode) for one in found.values()
    ]
