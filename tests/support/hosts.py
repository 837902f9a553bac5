"""What a daemon would have, without the daemon: directories, ledger and a sandbox backend over a hypervisor of choice."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from tests.support import leaks
from vmruntime.config.settings import GuestSettings, HypervisorSettings, Settings, StartSettings
from vmruntime.hypervisor.devices import host_architecture
from vmruntime.hypervisor.interface import Accelerator, Hypervisor
from vmruntime.hypervisor.libvirt.driver import LibvirtHypervisor, open_libvirt
from vmruntime.hypervisor.libvirt.place import embedded_uri
from vmruntime.hypervisor.qemu.driver import QemuHypervisor, find_qemu
from vmruntime.hypervisor.vsock import choose_transport, find_vsock
from vmruntime.model.sandbox import Sandbox, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.network.tap import SpareTap
from vmruntime.paths import Paths
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.container_vm import ContainerVmBackend
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.store.database import Database
from vmruntime.store.records import Ledger

GUEST = Path(os.environ.get("VMRUNTIME_GUEST", "/var/lib/vmruntime/guest"))
COLD = StartSettings(source="cold")
APPLETS = ("sh", "cat", "echo", "false", "head", "hostname", "id", "kill", "ls", "sleep", "true", "uname", "yes", "dd")


class Host:
    """Directories, ledger and a backend.

    Attributes:
        hypervisor: What the backend starts VMs with.
    """

    def __init__(
        self,
        base: Path,
        database: Database,
        hypervisor: Hypervisor,
        *,
        guest: Path = GUEST,
        boot_timeout: float = 60.0,
        cgroups: HostCgroups | None = None,
        start: StartSettings = COLD,
        new_tap: Callable[[], Awaitable[SpareTap]] | None = None,
    ) -> None:
        paths = Paths(base / "root", base / "run")
        paths.sandboxes.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            root=str(paths.root),
            run=str(paths.run),
            cgroup_parent=f"/{base.name}",
            guest=GuestSettings(directory=str(guest)),
            start=start,
            hypervisor=HypervisorSettings(boot_timeout=boot_timeout),
        )
        self.paths = paths
        self.database = database
        self.owned = OwnedResources(Ledger(database), cgroups or HostCgroups.detect())
        self.hypervisor = hypervisor
        self.backend = ContainerVmBackend(hypervisor, self.owned, paths, settings, 16384, new_tap=new_tap)


@contextlib.asynccontextmanager
async def open_host(
    base: Path,
    hypervisor: Hypervisor,
    *,
    guest: Path = GUEST,
    boot_timeout: float = 60.0,
    cgroups: HostCgroups | None = None,
    start: StartSettings = COLD,
    new_tap: Callable[[], Awaitable[SpareTap]] | None = None,
) -> AsyncIterator[Host]:
    """Yield a host; afterwards nothing may be left in its ledger."""
    database = await Database.open(base / "db")
    host = Host(
        base,
        database,
        hypervisor,
        guest=guest,
        boot_timeout=boot_timeout,
        cgroups=cgroups,
        start=start,
        new_tap=new_tap,
    )
    try:
        yield host
    finally:
        await host.backend.close()
        left = await host.owned.ledger.all()
        for resource in left:
            await host.owned.release(resource.owner)
        await database.close()
    assert left == []


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """Yield a directory with a short name (unix socket paths are short) that unprivileged helpers can pass through."""
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def qemu_hypervisor() -> QemuHypervisor:
    """Return the QEMU driver as this host can have it; guests run emulated, so that tests mean the same everywhere."""
    transport = choose_transport("auto", "")
    architecture = host_architecture()
    return QemuHypervisor(
        qemu=find_qemu("", architecture),
        architecture=architecture,
        accelerator=Accelerator.TCG,
        transport=transport,
        vsock_program=find_vsock(transport, ""),
        user="vmruntime",
    )


@functools.cache
def embedded() -> str:
    """Return the URI of libvirt inside this process: it has one directory as long as the process runs."""
    directory = Path(tempfile.mkdtemp(prefix="vmr-", dir="/tmp"))
    directory.chmod(0o755)
    atexit.register(shutil.rmtree, directory)
    return embedded_uri(directory)


@contextlib.asynccontextmanager
async def libvirt_hypervisor(base: Path, uri: str) -> AsyncIterator[LibvirtHypervisor]:
    """Yield the libvirt driver; guests run emulated, so that tests mean the same everywhere.

    Args:
        base: A directory of the test's.
        uri: Of a libvirtd, or embedded().
    """
    transport = choose_transport("auto", "")
    architecture = host_architecture()
    hypervisor = await open_libvirt(
        uri,
        owner=base,
        emulator=find_qemu("", architecture),
        architecture=architecture,
        accelerator=Accelerator.TCG,
        transport=transport,
        vsock_program=find_vsock(transport, ""),
        user="vmruntime",
    )
    try:
        yield hypervisor
    finally:
        left = await hypervisor.sweep([])
        await hypervisor.close()
    assert left == []


def open_tap() -> int:
    """Return a tap of this network namespace; the kernel chooses its name, and it goes with the descriptor."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"", 0x0002 | 0x1000 | 0x4000))
    return fd


def sandbox(identifier: str, spec: SandboxSpec | None = None) -> Sandbox:
    """Return the record of a sandbox that is being created."""
    metadata = SandboxMetadata(name="vm-test", uid=identifier, namespace="test")
    spec = spec or SandboxSpec(metadata=metadata)
    return Sandbox(id=identifier, spec=spec, state=SandboxState.CREATING, created_at=1)


def footprint(base: Path) -> leaks.Footprint:
    """Return where to look for what a host leaves behind: there is no daemon, so all of it is the test's own."""
    return leaks.Footprint(
        base=base,
        root=base / "root",
        run=base / "run",
        log=base / "daemon.log",
        cgroup_parent=f"/{base.name}",
        network=base.name,
        bridge="",
        reservations=base / "ipam",
        pid=lambda: None,
    )


def make_busybox_layer(directory: Path) -> Path:
    """Make an EROFS layer with a static BusyBox; return its path."""
    tree = directory / "busybox"
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin" / "busybox")
    for applet in APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:1001:1002::/srv:/bin/sh\n")
    (tree / "etc" / "group").write_text("root:x:0:\nweb:x:1002:\nextra:x:1003:web\n")
    image = directory / "busybox.erofs"
    subprocess.run(["mkfs.erofs", str(image), str(tree)], check=True, capture_output=True)
    return image
