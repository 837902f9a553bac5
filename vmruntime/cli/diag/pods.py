"""What is known of one pod: from the daemon, in its directories, in its network, and of its processes."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmruntime.aio.detached import drop_privileges
from vmruntime.cli.client import Client
from vmruntime.cli.context import App
from vmruntime.cli.diag import masking
from vmruntime.cli.diag.bundle import Bundle
from vmruntime.cli.diag.domain import collect_domain
from vmruntime.cli.render import info, plain
from vmruntime.generated import cri_pb2

LOGS = ("*.log", "*.xml")
MACHINE = "machine.json"
DISK_LIMITS = ("prlimit", "--as=1073741824", "--cpu=20", "--core=0", "--fsize=0", "--")
_STATUS = ("State", "VmRSS", "Threads")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A pod that is looked at.

    Attributes:
        id: Or the first digits of it, when no daemon tells the rest.
        client: None: no daemon answers.
    """

    id: str
    name: str = ""
    client: Client | None = None
    containers: Sequence[cri_pb2.Container] = ()

    @property
    def place(self) -> str:
        """Where it is in the archive."""
        return f"pods/{self.name}-{self.id[:13]}" if self.name else f"pods/{self.id[:13]}"


def collect(bundle: Bundle, app: App, pod: Subject) -> None:
    """Add everything of a pod."""
    _told(bundle, pod)
    directory = app.paths.sandbox(pod.id)
    for pattern in LOGS:
        for path in sorted(directory.glob(pattern)):
            bundle.file(f"{pod.place}/{path.name}", path)
    disks = _disks(app, pod)
    _processes(bundle, pod, [directory, *disks])
    _network(bundle, app, pod)
    collect_domain(bundle, app, pod.place, pod.id)
    for path in disks:
        _disk_directory(bundle, app, pod, path)


def _told(bundle: Bundle, pod: Subject) -> None:
    """Add what the daemon tells of the pod and its containers."""
    client = pod.client
    if client is None:
        return
    with bundle.trying(f"{pod.place}/pod.json"):
        request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
        answer = client.call(client.runtime.PodSandboxStatus, request, timeout=30)
        shown = {"status": masking.status(plain(answer.status)), "info": masking.info(info(answer.info))}
        bundle.json(f"{pod.place}/pod.json", shown)
    for container in pod.containers:
        name = f"{pod.place}/container-{container.metadata.name}-{container.metadata.attempt}.json"
        with bundle.trying(name):
            status_request = cri_pb2.ContainerStatusRequest(container_id=container.id, verbose=True)
            status = client.call(client.runtime.ContainerStatus, status_request, timeout=30)
            shown = {"status": masking.status(plain(status.status)), "info": masking.info(info(status.info))}
            bundle.json(name, shown)


def _processes(bundle: Bundle, pod: Subject, places: Sequence[Path]) -> None:
    """Add the processes that have a directory of the pod's on their command line: the VM and its helpers."""
    found = []
    for pid, argv in _command_lines(bundle.tools.path("/proc")):
        if any(str(place) in word for word in argv for place in places):
            status = bundle.tools.read(f"/proc/{pid}/status") or ""
            facts = ", ".join(" ".join(line.split()) for line in status.splitlines() if line.startswith(_STATUS))
            found.append(f"{pid}: {shlex.join(argv)}\n  {facts}\n")
    bundle.text(f"{pod.place}/processes.txt", "\n".join(found) or "none\n")


def _command_lines(proc: Path) -> Iterator[tuple[int, list[str]]]:
    for entry in sorted((path for path in proc.glob("[0-9]*")), key=lambda path: int(path.name)):
        try:
            data = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if data:
            yield int(entry.name), os.fsdecode(data).rstrip("\0").split("\0")


def _network(bundle: Bundle, app: App, pod: Subject) -> None:
    name = app.paths.pod_netns(pod.id).name
    if not bundle.tools.path(app.paths.pod_netns(pod.id)).exists():
        bundle.note(f"{pod.place}/network.txt", f"there is no network namespace {name}")
        return
    links = bundle.tools.run(["ip", "-n", name, "-j", "link"]) or "[]"
    filters = [
        ["tc", "-n", name, "-s", "filter", "show", "dev", str(link["ifname"]), "parent", "ffff:"]
        for link in json.loads(links)
    ]
    bundle.output(
        f"{pod.place}/network.txt",
        ["ip", "-n", name, "-d", "-s", "link"],
        ["ip", "-n", name, "addr"],
        ["ip", "-n", name, "route", "show", "table", "all"],
        ["ip", "-n", name, "neigh"],
        ["tc", "-n", name, "-s", "qdisc"],
        *filters,
    )


def _disks(app: App, pod: Subject) -> list[Path]:
    """Return the pod's directories of disks: the one of its id, or those whose id begins so."""
    try:
        return sorted(path for path in app.paths.pods.iterdir() if path.name.startswith(pod.id))
    except OSError:
        return []


def _disk_directory(bundle: Bundle, app: App, pod: Subject, directory: Path) -> None:
    lines = []
    with bundle.trying(str(directory)):
        for path in sorted(directory.iterdir()):
            status = path.lstat()
            lines.append(
                f"{status.st_mode:o} {status.st_uid} {status.st_size} ({status.st_blocks * 512}) {path.name}\n"
            )
    bundle.text(f"{pod.place}/disks.txt", "mode uid bytes (on the disk) name\n" + "".join(lines))
    if (directory / MACHINE).exists():
        bundle.file(f"{pod.place}/{MACHINE}", directory / MACHINE)
    # By the VM's account and within limits, since the file is what a VM has made of it.
    limits = [*_as_account(app.settings.hypervisor.user), *DISK_LIMITS]
    overlays = sorted(directory.glob("*.qcow2"))
    commands = [[*limits, "qemu-img", "info", "-U", "-f", "qcow2", "--", str(path)] for path in overlays]
    bundle.output(f"{pod.place}/qemu-img.txt", *commands)


def _as_account(user: str) -> list[str]:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return []
    return drop_privileges(user) if os.geteuid() == 0 else []
