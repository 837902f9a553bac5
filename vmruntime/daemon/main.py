"""The composition root: everything is made here, in the order it depends on each other, and closed in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog

from vmruntime.clock import SystemClock
from vmruntime.config.settings import Settings, StartSettings
from vmruntime.cri.server import CriServer
from vmruntime.daemon import image_pods
from vmruntime.daemon.access import check_passage
from vmruntime.daemon.cdi import load_cdi_specs
from vmruntime.daemon.conditions import DaemonConditions
from vmruntime.daemon.heap import share_heaps
from vmruntime.daemon.hooks import load_hooks, warn_of_bad_hooks
from vmruntime.daemon.images import DaemonImages
from vmruntime.daemon.lock import only_daemon
from vmruntime.daemon.logging import configure
from vmruntime.daemon.metrics import serve_metrics
from vmruntime.daemon.parts import Parts
from vmruntime.daemon.profiles import load_profile
from vmruntime.daemon.prune import prune_old
from vmruntime.daemon.readiness import notify
from vmruntime.daemon.tracing import tracing_to
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.devices import host_architecture
from vmruntime.hypervisor.interface import Accelerator, VsockTransport
from vmruntime.hypervisor.qemu.aio import choose_aio
from vmruntime.hypervisor.qemu.driver import QemuHypervisor, find_qemu
from vmruntime.hypervisor.vsock import choose_transport, find_vsock
from vmruntime.ids import new_id
from vmruntime.images.service import ImageService
from vmruntime.metrics.loop import measure_lag
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import SandboxKind
from vmruntime.network.service import NetworkService
from vmruntime.paths import Paths
from vmruntime.pods.context import Context, Hooks
from vmruntime.pods.machines import MachineControl
from vmruntime.pods.oci.rehearsal import rehearsal_spec
from vmruntime.pods.recovery import recover
from vmruntime.pods.registry import Registry
from vmruntime.pods.service import PodService
from vmruntime.sandboxes.acceleration import PROOF_SECONDS, choose_accelerator
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.container_vm import ContainerVmBackend
from vmruntime.sandboxes.host import HostBackend
from vmruntime.sandboxes.host_programs import find_host_programs
from vmruntime.sandboxes.interface import SandboxBackend
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.sandboxes.vm_volumes import release_share
from vmruntime.store.database import Database
from vmruntime.store.records import Facts, Ledger, PodRecords
from vmruntime.streaming.server import StreamingServer

log = structlog.get_logger(__name__)

STORE_ROOM = 1024 * 1024
"""Bytes: hundreds of pods can end on a full disk."""


async def serve(settings: Settings, parts: Parts | None = None) -> None:
    """Run the daemon until SIGTERM or SIGINT. Pods go on without it.

    Args:
        settings: The configuration.
        parts: Stand-ins for tests and benchmarks.

    Raises:
        VmruntimeError: It cannot start; the message names the cause and the remedy.
    """
    configure(settings.log)
    share_heaps()
    paths = Paths(root=Path(settings.root), run=Path(settings.run))
    _make_directories(paths)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    with only_daemon(paths.lock):
        async with contextlib.AsyncExitStack() as stack:
            await _start(settings, paths, parts or Parts(), stack)
            notify("READY=1")
            log.info("ready", socket=str(_socket(settings, paths)))
            await stopping.wait()
            notify("STOPPING=1")
            log.info("stopping; pods go on")


async def _start(settings: Settings, paths: Paths, parts: Parts, stack: contextlib.AsyncExitStack) -> None:
    await stack.enter_async_context(tracing_to(settings.tracing))  # first, so that it ends last
    database = await Database.open(paths.database, STORE_ROOM)
    stack.push_async_callback(database.close)
    clock = SystemClock()
    registry = Registry(PodRecords(database), clock)

    def layers_in_use() -> set[str]:
        return {layer for container in registry.containers(hidden=True) for layer in container.layers}

    def images_in_use() -> set[str]:
        return {image for container in registry.containers(hidden=True) for image in container.image_ids}

    def disks_in_use() -> set[str]:
        return {container.disk for container in registry.containers(hidden=True) if container.disk}

    images = ImageService(
        paths,
        database,
        settings.images,
        clock,
        in_use=layers_in_use,
        images_in_use=images_in_use,
        disks_in_use=disks_in_use,
        account=settings.hypervisor.user,
    )
    await images.load()
    network = parts.network or NetworkService(paths, settings.network)
    owned = OwnedResources(Ledger(database), parts.cgroups or HostCgroups.detect())

    async def release_network(resource: Resource) -> None:
        await network.teardown(resource.key)

    owned.add_releaser(ResourceKind.NETWORK, release_network)
    owned.add_releaser(ResourceKind.SHARE, release_share)
    hypervisor = parts.hypervisor or await _hypervisor(settings, paths, owned, Facts(database))
    backend = ContainerVmBackend(
        hypervisor,
        owned,
        paths,
        settings,
        _host_memory_mib(),
        new_tap=network.spare_tap,
        rehearsal=rehearsal_spec(),
        can_share_memory=hypervisor.transport is VsockTransport.NATIVE,
    )
    backends: dict[SandboxKind, SandboxBackend] = {SandboxKind.CONTAINER: backend}
    image_host = image_pods.Host(
        settings=settings,
        paths=paths,
        owned=owned,
        network=network,
        clock=clock,
        qemu=hypervisor,
        memory_mib=_host_memory_mib(),
    )
    backends[SandboxKind.IMAGE] = machines = await image_pods.image_backend(image_host, stack)
    if (host := _host_backend(settings, paths, owned)) is not None:
        backends[SandboxKind.HOST] = host
    await asyncio.to_thread(warn_of_bad_hooks, settings.hooks_dirs)
    context = Context(
        registry=registry,
        owned=owned,
        backends=backends,
        network=network,
        images=images,
        clock=clock,
        new_id=new_id,
        spares=backend,
        paths=paths,
        load_profile=load_profile,
        load_cdi=lambda: load_cdi_specs(settings.cdi_spec_dirs),
        hooks=Hooks(lambda: load_hooks(settings.hooks_dirs), skip_in_vms=settings.hooks_in_vms == "skip"),
    )
    stack.push_async_callback(backend.close)  # after _let_go: pods that are being made give back what they have claimed
    stack.push_async_callback(_let_go, context)
    await recover(context)
    await backend.open()
    await machines.sweep({sandbox.id for sandbox in registry.sandboxes(hidden=True)})
    if settings.images.prune_after_days:
        context.scope.start(prune_old(images, settings.images.prune_after_days), "unused images")
    stack.enter_context(serve_metrics(settings.metrics, registry, images, hypervisor))
    if settings.metrics.address:
        context.scope.start(measure_lag(), "event loop's lag")
    pods = PodService(context)
    streaming = StreamingServer(pods, settings.streaming, clock)
    await streaming.start()
    stack.push_async_callback(streaming.stop)
    server = CriServer(
        pods=pods,
        images=DaemonImages(images),
        machines=MachineControl(context),
        conditions=DaemonConditions(settings, network, hypervisor, backend.start_state),
        streams=streaming,
        node_network=network,
        settings=settings,
        kinds=frozenset(context.backends),
        socket=_socket(settings, paths),
    )
    await server.start()
    stack.push_async_callback(server.stop)


async def _let_go(context: Context) -> None:
    """Stop watching; the VMs go on and the next daemon adopts them."""
    await context.scope.close()
    for live in list(context.live.values()):
        await live.scope.close()
        await live.running.close()


def _host_backend(settings: Settings, paths: Paths, owned: OwnedResources) -> HostBackend | None:
    """Return what runs host pods; None: the settings or this host do not allow any."""
    if settings.host_pods == "never":
        return None
    try:
        return HostBackend(find_host_programs(settings.host), owned, paths, settings)
    except FailedPrecondition as error:
        log.warning("no host pods", why=str(error))
        return None


async def _hypervisor(settings: Settings, paths: Paths, owned: OwnedResources, facts: Facts) -> QemuHypervisor:
    """Find out what this host can do and return the driver that fits it."""
    wanted = settings.hypervisor
    architecture = host_architecture()
    qemu = find_qemu(wanted.qemu, architecture)
    transport = choose_transport(wanted.vsock, wanted.vhost_device_vsock)
    program = find_vsock(transport, wanted.vhost_device_vsock)
    for directory in (paths.sandboxes, paths.disks, paths.pods):  # refuse to start rather than fail at the first pod
        await check_passage(directory, wanted.user)

    aio = await choose_aio(qemu, wanted.user)

    def driver(accelerator: Accelerator) -> QemuHypervisor:
        return QemuHypervisor(
            qemu=qemu,
            architecture=architecture,
            accelerator=accelerator,
            transport=transport,
            vsock_program=program,
            user=wanted.user,
            aio=aio,
        )

    def trial() -> ContainerVmBackend:
        impatient = msgspec.structs.replace(wanted, boot_timeout=PROOF_SECONDS)
        trial_settings = msgspec.structs.replace(settings, hypervisor=impatient, start=StartSettings(source="cold"))
        return ContainerVmBackend(driver(Accelerator.KVM), owned, paths, trial_settings, _host_memory_mib())

    kernel = settings.guest_directory / "vmlinuz"
    return driver(await choose_accelerator(wanted.accelerator, qemu, kernel, facts, trial, new_id()))


def _make_directories(paths: Paths) -> None:
    """Make the two roots. VMs and their helpers run unprivileged and must pass through: sockets are below RUN, disks below ROOT.

    Raises:
        FailedPrecondition: A directory cannot be made.
    """
    passed = (paths.root, paths.run, paths.sandboxes, paths.disks, paths.pods)
    private = (paths.run / "logs", paths.cni_cache, paths.incoming, paths.downloads)
    for directory in (*passed, *private):
        with _must_be_made(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # What is private is closed before the way to it is opened: an earlier version's ROOT was closed as a whole.
    for directory in (*private, *reversed(passed)):
        with _must_be_made(directory):
            directory.chmod(0o700 if directory in private else 0o711)


@contextlib.contextmanager
def _must_be_made(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailedPrecondition(
            f"the directory {directory} cannot be made: {error.strerror}", remedy="run the daemon as root"
        ) from error


def _host_memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024**2


def _socket(settings: Settings, paths: Paths) -> Path:
    return Path(settings.socket) if settings.socket else paths.socket
