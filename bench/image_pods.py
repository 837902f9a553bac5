"""Image pods: how soon a guest's kernel starts, and what a machine takes of the host's memory."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from bench.bed import Bed, timed
from bench.processes import by_program, pod_memory
from bench.records import Record, percentile, record
from tests.support import image_pods, vm_images
from tests.support.daemon import Daemon
from tests.support.image_pods import Machine
from tests.support.libvirtd import libvirtd
from tests.support.load import QUIET
from vmruntime.config.settings import HypervisorSettings
from vmruntime.generated import cri_pb2 as cri
from vmruntime.hypervisor.libvirt.domain import QEMU_NAMESPACE

ROUNDS = 6
IDLE_MACHINES = 2
SETTLE_SECONDS = 5.0
IMAGE = "virtlet.cloud/small"
KERNEL = b"Linux version"
DEADLINE = 120.0


def image_pod_start(bed: Bed) -> list[Record]:
    """RunPodSandbox, CreateContainer and StartContainer until the guest's kernel starts, beside `virsh start`."""
    bed.rest()
    values, without_create, bare = [], [], []
    phases: dict[str, list[float]] = {}
    with _machines(bed.base / "start") as (daemon, uri):
        _, machine = _start(daemon, "warm-up")
        with _peer(uri, machine, bed.base / "peer") as peer:
            _remove(machine)
            peer.start()
            for number in range(ROUNDS):
                bare.append(peer.start())
                found, machine = _start(daemon, f"round-{number}")
                _remove(machine)
                values.append(sum(found.values()))
                without_create.append(values[-1] - found["create_container"])
                for phase, milliseconds in found.items():
                    phases.setdefault(phase, []).append(milliseconds)
    extra = {
        "phases_p50_ms": {phase: round(percentile(found, 50), 1) for phase, found in phases.items()},
        "without_create_p50_ms": round(percentile(without_create, 50), 1),
        "over_peer_ms": round(percentile(values, 50) - percentile(bare, 50), 1),
    }
    words = "virsh start of the same domain on the same libvirtd, to the same line; it has no NIC and no vsock"
    return [record("image_pod_start", "ms", values, peer=words, peer_values=bare, extra=extra)]


def image_pod_memory(bed: Bed) -> list[Record]:
    """Proportional set size of idle image pods with one volume, whose guests are up."""
    bed.rest()
    volume = bed.base / "volume"
    volume.mkdir()
    mounts = [cri.Mount(container_path="/volume", host_path=str(volume))]
    with _machines(bed.base / "idle") as (daemon, _):
        names = [f"idle-{number}" for number in range(IDLE_MACHINES)]
        machines = [image_pods.boot(daemon, name, IMAGE, mounts=mounts) for name in names]
        for machine in machines:
            machine.wait_agent()
        time.sleep(SETTLE_SECONDS)
        found = [pod_memory(machine.pod) for machine in machines]
        for machine in machines:
            _remove(machine)
    extra = {
        "beside_guest_mib": round(percentile([one.beside_guest for one in found], 50), 1),
        "of_that_translated_code_mib": round(percentile([one.code for one in found], 50), 1),
        **by_program(found),
    }
    return [record("pss_idle_image_pod", "MiB", [one.total for one in found], extra=extra)]


@contextlib.contextmanager
def _machines(base: Path) -> Iterator[tuple[Daemon, str]]:
    """Yield a daemon with the small image and the URI of the libvirtd, nobody else's, that runs its machines."""
    with libvirtd(base / "libvirtd") as host:
        extra = f'{QUIET}[hypervisor]\nimage_pods = "libvirt"\nlibvirt_uri = "{host.uri}"\n'
        with image_pods.image_daemon(base / "d", {"small": vm_images.small().as_uri()}, extra) as daemon:
            image_pods.pull(daemon, IMAGE)
            yield daemon, host.uri


def _start(daemon: Daemon, name: str) -> tuple[dict[str, float], Machine]:
    """Start an image pod; return milliseconds of each step until the guest's kernel starts, and the pod."""
    run, pod = timed(image_pods.run_pod, daemon, name)
    create, container = timed(image_pods.create, daemon, pod, name, IMAGE)
    start, _ = timed(image_pods.start, daemon, container)
    machine = Machine(daemon, name, pod, container)
    boot, _ = timed(_wait_for_kernel, machine.directory / "console.log")
    steps = {"run_pod_sandbox": run, "create_container": create, "start_container": start, "firmware": boot}
    return steps, machine


def _remove(machine: Machine) -> None:
    machine.stop(0)  # a guest that only boots does not notice the power button
    machine.daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=machine.pod))


class _Peer:
    """A pod's machine as libvirt alone starts it: the same domain, with disks and a console of its own."""

    def __init__(self, uri: str, name: str, directory: Path) -> None:
        self._virsh = ["virsh", "--quiet", "--connect", uri]
        self._name = name
        self._console = directory / "console.log"

    def start(self) -> float:
        """Start and end it; return milliseconds until the guest's kernel starts."""
        self._console.write_bytes(b"")
        began = time.monotonic()
        with subprocess.Popen([*self._virsh, "start", self._name]) as virsh:
            try:
                _wait_for_kernel(self._console)
                milliseconds = (time.monotonic() - began) * 1000
            finally:
                virsh.wait(DEADLINE)
                subprocess.run([*self._virsh, "destroy", self._name], check=True)
        return milliseconds


@contextlib.contextmanager
def _peer(uri: str, machine: Machine, directory: Path) -> Iterator[_Peer]:
    """Yield the peer of a pod's machine; afterwards libvirt does not know it any more."""
    directory.mkdir()
    virsh = ["virsh", "--quiet", "--connect", uri]
    dump = [*virsh, "dumpxml", "--inactive", machine.info()["machine"]["uuid"]]
    domain = ET.fromstring(subprocess.run(dump, check=True, capture_output=True, text=True).stdout)
    name = _make_own(domain, directory)
    ET.register_namespace("qemu", QEMU_NAMESPACE)
    (directory / "domain.xml").write_text(ET.tostring(domain, encoding="unicode"))
    subprocess.run([*virsh, "define", str(directory / "domain.xml")], check=True)
    try:
        yield _Peer(uri, name, directory)
    finally:
        subprocess.run([*virsh, "undefine", name], check=True)


def _make_own(domain: ET.Element, directory: Path) -> str:
    """Give a domain a name, disks and a console of its own, and return the name."""
    name = "vmruntime-bench-peer"
    _only(domain, "name").text, _only(domain, "uuid").text = name, str(uuid.uuid4())
    domain.remove(_only(domain, "metadata"))  # by it the daemon would take the domain for one that it has forgotten
    for disk in domain.iterfind("./devices/disk"):
        _copy_disk(disk, directory)
    console = directory / "console.log"
    console.touch()
    for port in (*domain.iterfind("./devices/serial"), *domain.iterfind("./devices/console")):
        port.set("type", "file")
        source = _only(port, "source")
        source.attrib.clear()
        source.set("path", str(console))
    account = pwd.getpwnam(HypervisorSettings().user)
    for path in directory.iterdir():
        os.chown(path, account.pw_uid, account.pw_gid)
    return name


def _copy_disk(disk: ET.Element, directory: Path) -> None:
    """Copy a disk and the image that it is based on; the daemon has them passed as descriptors, this goes by paths."""
    sources = disk.iter("source")
    top, *below = list(sources)
    serial = _only(disk, "serial").text
    for number, source in enumerate((top, *below)):
        copy = directory / f"{serial}-{number}"
        source.attrib.pop("fdgroup")
        shutil.copyfile(source.attrib["file"], copy)
        source.set("file", str(copy))
    if below:
        image_format = disk.find("./backingStore/format")
        assert image_format is not None
        based = ["-b", below[0].attrib["file"], "-F", image_format.attrib["type"]]
        subprocess.run(["qemu-img", "rebase", "-u", *based, top.attrib["file"]], check=True)


def _only(element: ET.Element, tag: str) -> ET.Element:
    found = element.find(tag)
    assert found is not None, f"no {tag} in {element.tag}"
    return found


def _wait_for_kernel(console: Path) -> None:
    end = time.monotonic() + DEADLINE
    while KERNEL not in console.read_bytes():
        if time.monotonic() > end:
            raise TimeoutError(f"no kernel within {DEADLINE:g} s: {console.read_bytes()[-500:]!r}")
        time.sleep(0.002)
