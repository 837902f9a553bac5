"""From a container of an image pod to its machine: root disk, block volumes, cloud-init's seed."""

from __future__ import annotations

import hashlib
import os
import pwd
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vmruntime import tracing
from vmruntime.agent.interface import GuestMachine
from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import InvalidArgument
from vmruntime.images.overlay import make_overlay
from vmruntime.images.persistent_root import prepare as prepare_root
from vmruntime.model.container import Device
from vmruntime.model.image_pod import DiskDriver
from vmruntime.model.sandbox import Dns, Sandbox
from vmruntime.sandboxes.image_vm.boot import image_pod
from vmruntime.sandboxes.image_vm.definition import Definition, MachineDisk
from vmruntime.sandboxes.image_vm.volumes import GuestVolumes, guest_volumes, source_content
from vmruntime.seed.build import build_seed
from vmruntime.seed.request import SeedDevice, SeedRequest

ROOT_SERIAL, SEED_SERIAL = "root", "seed"
MOST_DISKS = {DiskDriver.VIRTIO: 20, DiskDriver.SCSI: 26}
"""With root and seed; Virtlet's limits, which are those of device names and PCI slots."""

BY_ID = {
    DiskDriver.SCSI: "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_",
    DiskDriver.VIRTIO: "/dev/disk/by-id/virtio-",
}


class Account(msgspec.Struct, frozen=True):
    """Who VMs run as."""

    name: str
    uid: int
    gid: int

    @classmethod
    def of(cls, name: str) -> Account:
        """Look up an account."""
        found = pwd.getpwnam(name)
        return cls(name, found.pw_uid, found.pw_gid)


def check_devices(sandbox: Sandbox, devices: Sequence[Device]) -> None:
    """Look at the block volumes of an image pod. Blocks.

    Raises:
        InvalidArgument: One is no block device, or there are too many.
    """
    for device in devices:
        field = device.field or "config.devices[].host_path"
        try:
            mode = os.stat(device.host_path).st_mode
        except OSError as error:
            raise InvalidArgument.field(field, device.host_path, f"cannot be used: {error.strerror}") from error
        if not stat.S_ISBLK(mode):
            raise InvalidArgument.field(
                field, device.host_path, "is no block device, which alone a VM can be given", remedy="leave it out"
            )
    driver = image_pod(sandbox).disk_driver
    if len(devices) + 2 > MOST_DISKS[driver]:
        raise InvalidArgument(
            f"config.devices: {len(devices)} block volumes, but a VM with {driver.value} disks has room for"
            f" {MOST_DISKS[driver] - 2}",
            remedy="give it fewer" if driver is DiskDriver.SCSI else "use scsi disks (vmruntime.io/disk-driver)",
        )


def volume_serial(device: Device) -> str:
    """Return the serial of a block volume: the same for the same place in the guest; virtio-blk passes on 20 characters."""
    return f"vol-{hashlib.sha256(device.container_path.encode()).hexdigest()[:12]}"


class Definer:
    """Makes machines of one pod out of containers."""

    def __init__(self, sandbox: Sandbox, directory: Path, disks: Path, account: Account) -> None:
        """Make nothing yet.

        Args:
            sandbox: The pod.
            directory: Its runtime directory, with the console's file.
            disks: Its directory of disks.
            account: Who its VM runs as.
        """
        self._sandbox = sandbox
        self._directory = directory
        self._disks = disks
        self._account = account

    async def define(self, container_id: str, machine: GuestMachine) -> Definition:
        """Make everything that a container's machine needs on the host, and say what it is made of.

        Raises:
            VmruntimeError: See make_disks().
        """
        spec, pod = machine.spec, image_pod(self._sandbox)
        volumes = await guest_volumes(container_id, spec.mounts, chown=pod.chown_mounts)
        return Definition(
            container_id=container_id,
            image_id=machine.image_id,
            size=machine.size,
            disks=await make_disks(self._sandbox, machine, self._disks, self._account, volumes),
            mounts=volumes.shared,
            console_start=await in_thread(lambda: console_size(self._directory)),
        )


def console_size(directory: Path) -> int:
    """Return how much the console's file has; none: 0. Blocks."""
    try:
        return (directory / "console.log").stat().st_size
    except FileNotFoundError:
        return 0


async def make_disks(
    sandbox: Sandbox, machine: GuestMachine, directory: Path, account: Account, volumes: GuestVolumes
) -> list[MachineDisk]:
    """Make everything that a machine boots with, in the pod's directory of disks.

    Raises:
        InvalidArgument: Something cannot be used; the message names it.
        FailedPrecondition: A persistent root has another image.
        ResourceExhausted: The disk is full.
    """
    driver = image_pod(sandbox).disk_driver
    roots = [device for device in machine.spec.devices if device.container_path == "/"]
    others = [device for device in machine.spec.devices if device.container_path != "/"]
    if roots:
        root = await _persistent_root(machine, roots[0], directory, driver, account)
    else:
        root = await _overlay(sandbox, machine, directory, driver)
    extra = [
        MachineDisk(
            path=os.path.realpath(device.host_path),
            serial=volume_serial(device),
            readonly="w" not in device.permissions,
            driver=driver,
        )
        for device in others
    ]
    request = await seed_request(sandbox, machine, others, volumes)
    seed = directory / "seed.iso"
    with tracing.span("vm.seed"):
        await in_thread(lambda: _write_seed(request, seed))
    return [root, *extra, MachineDisk(path=str(seed), serial=SEED_SERIAL, readonly=True, cdrom=True)]


@tracing.timed("vm.root_disk")
async def _overlay(sandbox: Sandbox, machine: GuestMachine, directory: Path, driver: DiskDriver) -> MachineDisk:
    """Return the pod's own copy of the image, made once: a container that is started again finds its disk as it was."""
    overlay = directory / "root.qcow2"
    await make_overlay(
        overlay,
        Path(machine.disk_path),
        machine.disk.format,
        machine.disk.virtual_size,
        image_pod(sandbox).root_volume_size,
        "",  # root's: VMs get it as a descriptor, and no VM may open another one's by its path
    )
    return MachineDisk(
        path=str(overlay),
        serial=ROOT_SERIAL,
        format="qcow2",
        backing=machine.disk_path,
        backing_format=machine.disk.format,
        driver=driver,
    )


@tracing.timed("vm.root_disk")
async def _persistent_root(
    machine: GuestMachine, device: Device, directory: Path, driver: DiskDriver, account: Account
) -> MachineDisk:
    if "w" not in device.permissions:
        raise InvalidArgument(
            f"config.devices: {device.host_path!r} is to be the root disk, and read-only",
            remedy="let the volume be written",
        )
    node = directory / "root.dev"
    await in_thread(lambda: _make_node(node, device, account))
    try:
        size = await prepare_root(
            Path(device.host_path),
            Path(machine.disk_path),
            machine.disk,
            machine.disk.digest,
            account=account.name,
            node=node,
        )
    finally:
        await in_thread(lambda: node.unlink(missing_ok=True))
    return MachineDisk(path=os.path.realpath(device.host_path), serial=ROOT_SERIAL, size=size, driver=driver)


async def seed_request(
    sandbox: Sandbox, machine: GuestMachine, devices: Sequence[Device], volumes: GuestVolumes
) -> SeedRequest:
    """Return what a guest is told by cloud-init.

    Raises:
        NotFound: A ConfigMap or Secret that an annotation names is not among the container's volumes.
    """
    pod, spec, metadata = image_pod(sandbox), sandbox.spec, sandbox.spec.metadata
    mounts = machine.spec.mounts
    return SeedRequest(
        # The same for a pod that comes again with the same name: a persistent root is not set up twice.
        instance_id=f"{metadata.name}.{metadata.namespace}",
        hostname=spec.hostname or metadata.name[:63],
        image_pod=pod,
        ssh_keys=await source_content(pod.ssh_key_source, mounts, "ssh-key-source"),
        user_data=await source_content(pod.user_data_source, mounts, "cloud-init-user-data-source"),
        files=await source_content(pod.files_source, mounts, "files-from-data-source"),
        network=sandbox.network,
        dns=spec.dns if spec.dns != Dns() else sandbox.network.dns if sandbox.network else Dns(),
        envs=machine.spec.envs,
        injected=volumes.files,
        mounts=volumes.mounts,
        devices=[
            SeedDevice(path=device.container_path, source=BY_ID[pod.disk_driver] + volume_serial(device))
            for device in devices
        ],
    )


def _make_node(node: Path, device: Device, account: Account) -> None:
    """Make a node of our own for a block device, which qemu-img may open as the VMs' account: the host's belongs to root."""
    node.unlink(missing_ok=True)
    os.mknod(node, stat.S_IFBLK | 0o600, os.stat(device.host_path).st_rdev)
    os.chown(node, account.uid, account.gid)


def _write_seed(request: SeedRequest, path: Path) -> None:
    path.unlink(missing_ok=True)
    build_seed(request, path)
