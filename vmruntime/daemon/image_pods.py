"""Who runs image pods, as the settings and this host have it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from vmruntime.aio.inotify import FileChanges
from vmruntime.aio.pipeline import in_thread
from vmruntime.clock import Clock
from vmruntime.config.settings import Settings
from vmruntime.daemon.parts import Driver
from vmruntime.errors import FailedPrecondition, Internal, VmruntimeError
from vmruntime.hypervisor.devices import host_architecture
from vmruntime.hypervisor.interface import Hypervisor, Recorder, VirtualMachine, VmHandle, VmSpec
from vmruntime.hypervisor.qemu.driver import find_qemu
from vmruntime.hypervisor.vsock import find_vsock
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Sandbox
from vmruntime.paths import Paths
from vmruntime.pods.ports import Network, Tap
from vmruntime.sandboxes.image_vm.backend import ImageVmBackend
from vmruntime.sandboxes.image_vm.parts import MachineParts
from vmruntime.sandboxes.ledger import OwnedResources

if TYPE_CHECKING:
    from vmruntime.hypervisor.libvirt.driver import LibvirtHypervisor

log = structlog.get_logger(__name__)

LIBVIRT, QEMU = "libvirt", "qemu"


@dataclasses.dataclass(frozen=True)
class Host:
    """What image pods need of the daemon.

    Attributes:
        qemu: The driver of container pods.
    """

    settings: Settings
    paths: Paths
    owned: OwnedResources
    network: Network
    clock: Clock
    qemu: Driver
    memory_mib: int


async def image_backend(host: Host, stack: contextlib.AsyncExitStack) -> ImageVmBackend:
    """Return what runs image pods, and teach the ledger how their machines are released.

    Raises:
        FailedPrecondition: Machines run that only libvirt leads to, and it does not answer: to go on without them would
            be to give them up.
    """
    owned = host.owned
    running = {one.data["driver"] for one in await owned.ledger.all() if one.kind is ResourceKind.MACHINE}
    hypervisors: dict[str, Hypervisor] = {QEMU: host.qemu}
    wanted = _wanted(host.settings)
    if LIBVIRT in {wanted, *running}:
        hypervisors[LIBVIRT] = libvirt = LibvirtOnDemand(host)
        stack.push_async_callback(libvirt.close)  # now, so that it is called after those who watch machines are gone
        if LIBVIRT in running:
            try:
                await libvirt.driver()
            except VmruntimeError as error:
                raise FailedPrecondition(
                    f"image pods run under libvirt, which cannot be used: {error}",
                    remedy="start libvirtd, then this daemon",
                ) from error

    async def forget(resource: Resource) -> None:
        hypervisor = hypervisors.get(resource.data["driver"])
        if hypervisor is None:
            raise Internal(f"nobody leads to the driver {resource.data['driver']} of the machine {resource.key}")
        await hypervisor.forget(resource.key)

    owned.add_releaser(ResourceKind.MACHINE, forget)
    changes = FileChanges()
    stack.callback(changes.close)

    async def open_taps(sandbox: Sandbox) -> Sequence[Tap]:
        return await host.network.open_taps(sandbox)

    parts = MachineParts(
        hypervisors=hypervisors,
        driver=wanted,
        owned=owned,
        paths=host.paths,
        settings=host.settings,
        clock=host.clock,
        changes=changes,
        open_taps=open_taps,
    )
    return ImageVmBackend(parts, host.memory_mib)


def _wanted(settings: Settings) -> str:
    """Return the name of the driver that machines are to be started with."""
    if settings.hypervisor.image_pods != "auto":
        return settings.hypervisor.image_pods
    return LIBVIRT if importlib.util.find_spec("libvirt") is not None else QEMU


class LibvirtOnDemand:
    """libvirt, connected to when the first image pod needs it: nodes without any do not pay for it.

    Implements hypervisor.interface.Hypervisor. While libvirt does not answer, every call says so, and the next one tries again.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._driver: LibvirtHypervisor | None = None
        self._opening = asyncio.Lock()

    async def driver(self) -> LibvirtHypervisor:
        """Return the driver, connected.

        Raises:
            FailedPrecondition: This Python has no library for libvirt.
            HypervisorError: libvirt does not answer.
        """
        async with self._opening:
            if self._driver is None:
                self._driver = await _libvirt(self._host)
            return self._driver

    async def close(self) -> None:
        """Disconnect, if there is a connection; machines go on."""
        if self._driver is not None:
            await self._driver.close()

    async def shape(self, spec: VmSpec) -> str:
        """Return nothing: image pods are not frozen."""
        return ""

    async def start(self, spec: VmSpec, record: Recorder) -> VirtualMachine:
        """Start a VM."""
        return await (await self.driver()).start(spec, record)

    async def adopt(self, handle: VmHandle) -> VirtualMachine:
        """Take over a VM of an earlier daemon."""
        return await (await self.driver()).adopt(handle)

    async def sweep(self, keep: Iterable[str]) -> list[str]:
        """End what no sandbox has; nothing, where no daemon has used libvirt since the host was started."""
        if self._driver is None and not await in_thread(_directory(self._host).exists):
            return []
        return await (await self.driver()).sweep(keep)

    async def forget(self, uuid: str) -> None:
        """End a machine, and let libvirt forget it."""
        await (await self.driver()).forget(uuid)


def _directory(host: Host) -> Path:
    return host.paths.run / "libvirt"


async def _libvirt(host: Host) -> LibvirtHypervisor:
    if importlib.util.find_spec("libvirt") is None:
        raise FailedPrecondition(
            'hypervisor.image_pods: "libvirt", but this Python has no library for it',
            remedy="pip install 'vmruntime[libvirt]', or set it to qemu",
        )
    # Here, because libvirt's library begins to log when it is loaded, and hosts may do without it.
    from vmruntime.hypervisor.libvirt.driver import open_libvirt
    from vmruntime.hypervisor.libvirt.place import choose_uri

    wanted, architecture = host.settings.hypervisor, host_architecture()
    driver = await open_libvirt(
        choose_uri(wanted.libvirt_uri, _directory(host)),
        owner=host.paths.root,
        emulator=find_qemu(wanted.qemu, architecture),
        architecture=architecture,
        accelerator=host.qemu.accelerator,
        transport=host.qemu.transport,
        vsock_program=find_vsock(host.qemu.transport, wanted.vhost_device_vsock),
        user=wanted.user,
    )
    log.info("libvirt runs image pods", uri=driver.uri)
    return driver
