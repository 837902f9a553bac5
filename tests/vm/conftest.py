"""One booted guest for all tests of this folder, and a BusyBox layer."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support import leaks
from vmruntime.config.settings import GuestSettings, HypervisorSettings, Settings
from vmruntime.hypervisor.devices import host_architecture
from vmruntime.hypervisor.interface import Accelerator, VsockTransport
from vmruntime.hypervisor.qemu.driver import QemuHypervisor, find_qemu
from vmruntime.hypervisor.vsock import choose_transport, find_program
from vmruntime.model.sandbox import Sandbox, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.paths import Paths
from vmruntime.sandboxes.cgroup import HostCgroups
from vmruntime.sandboxes.container_vm import ContainerVm, ContainerVmBackend
from vmruntime.sandboxes.ledger import OwnedResources
from vmruntime.store.database import Database
from vmruntime.store.records import Ledger

GUEST = Path(os.environ.get("VMRUNTIME_GUEST", "/var/lib/vmruntime/guest"))


class Host:
    """What a daemon would have: directories, ledger and a backend that boots with TCG."""

    def __init__(self, base: Path, database: Database, guest: Path = GUEST, boot_timeout: float = 60.0) -> None:
        paths = Paths(base / "root", base / "run")
        paths.sandboxes.mkdir(parents=True, exist_ok=True)
        settings = Settings(
            root=str(paths.root),
            run=str(paths.run),
            cgroup_parent=f"/{base.name}",
            guest=GuestSettings(directory=str(guest)),
            hypervisor=HypervisorSettings(boot_timeout=boot_timeout),
        )
        transport = choose_transport("auto", "")
        architecture = host_architecture()
        self.paths = paths
        self.owned = OwnedResources(Ledger(database), HostCgroups.detect())
        self.hypervisor = QemuHypervisor(
            qemu=find_qemu("", architecture),
            architecture=architecture,
            accelerator=Accelerator.TCG,
            transport=transport,
            vsock_program=find_program("") if transport is VsockTransport.VHOST_USER else "",
            user="vmruntime",
        )
        self.backend = ContainerVmBackend(self.hypervisor, self.owned, paths, settings, 16384)


def sandbox(identifier: str) -> Sandbox:
    """Return the record of a sandbox that is being created."""
    metadata = SandboxMetadata(name="vm-test", uid=identifier, namespace="test")
    return Sandbox(id=identifier, spec=SandboxSpec(metadata=metadata), state=SandboxState.CREATING, created_at=1)


@pytest.fixture
def base() -> Iterator[Path]:
    """A short directory that unprivileged helpers can pass through."""
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(autouse=True)
def no_leaks(base: Path) -> Iterator[None]:
    """Fail a test after which anything of its host is left: there is no daemon, so all of it is the test's own."""
    footprint = leaks.Footprint(
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
    with leaks.nothing_left(footprint):
        yield


@pytest.fixture
async def host(base: Path) -> AsyncIterator[Host]:
    """A host; afterwards nothing may be left in its ledger."""
    database = await Database.open(base / "db")
    host = Host(base, database)
    yield host
    left = await host.owned.ledger.all()
    for resource in left:
        await host.owned.release(resource.owner)
    await database.close()
    assert left == []


@pytest.fixture
async def guest(host: Host) -> AsyncIterator[ContainerVm]:
    """A booted guest."""
    one = sandbox("ab" * 32)
    running = await host.backend.start(one)
    yield running
    await running.close()
    await host.backend.release(one.id, final=True)


@pytest.fixture(scope="session")
def busybox_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EROFS layer with a static BusyBox."""
    tree = tmp_path_factory.mktemp("busybox")
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev"):
        (tree / name).mkdir()
    shutil.copy("/bin/busybox", tree / "bin" / "busybox")
    for applet in ("sh", "cat", "echo", "id", "sleep", "uname", "hostname", "head", "yes", "dd", "ls", "kill"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:1001:1002::/srv:/bin/sh\n")
    (tree / "etc" / "group").write_text("root:x:0:\nweb:x:1002:\nextra:x:1003:web\n")
    image = tree.parent / "busybox.erofs"
    subprocess.run(["mkfs.erofs", str(image), str(tree)], check=True, capture_output=True)
    return image
