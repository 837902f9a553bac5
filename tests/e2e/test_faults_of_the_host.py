"""A host that lacks something: programs, room, a guest that boots, a network that works."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support import leaks
from tests.support.daemon import GUEST, Daemon, running_daemon, sandbox_config
from tests.support.pods import create, run_pod, sh, start, status, wait_exit
from tests.support.refusal import refused
from tests.support.registry import build_image, files
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

Code = grpc.StatusCode


def pull(daemon: Daemon, name: str) -> str:
    return str(daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=name)), timeout=60).image_ref)


def run(daemon: Daemon, pod: str = "pod") -> Any:
    """Run a pod with a deadline, and take it away."""
    answer = daemon.runtime.RunPodSandbox(
        cri.RunPodSandboxRequest(config=sandbox_config(pod, daemon.base)), timeout=100
    )
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=answer.pod_sandbox_id))


# --- what keeps a daemon from starting


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ('[hypervisor]\nqemu = "/no/qemu"', ("hypervisor.qemu", "/no/qemu", "qemu-system-x86")),
        (
            '[hypervisor]\nvsock = "vhost-user"\nvhost_device_vsock = "/no/helper"',
            ("hypervisor.vhost_device_vsock", "/no/helper"),
        ),
        ('[hypervisor]\nuser = "no-such-account"', ("hypervisor.user", "no-such-account", "create it")),
        ('[hypervisor]\naccelerator = "kvm"\nqemu = "/bin/false"', ("hypervisor.qemu", "/bin/false", "status 1")),
        ('[network]\ndefault_subnet = "10.0.0.0/30"', ("network.default_subnet", "10.0.0.0/30")),
    ],
)
def test_a_daemon_that_cannot_start_says_why(base: Path, extra: str, words: tuple[str, ...]) -> None:
    daemon = Daemon(base / f"s{os.urandom(2).hex()}", extra)
    with pytest.raises(AssertionError, match="the daemon ended") as failed:
        daemon.start()
    assert daemon.exit_status() == 1
    last = str(failed.value).strip().splitlines()[-1]
    assert "error: " in last
    assert [word for word in words if word not in last] == []
    daemon.end()


def test_a_directory_that_stops_the_vms_account(base: Path) -> None:
    """QEMU runs unprivileged and has to reach its sockets: all the way from the root directory."""
    closed = base / "closed"
    daemon = Daemon(closed / "d")
    closed.chmod(0o700)
    with pytest.raises(AssertionError, match="the daemon ended"):
        daemon.start()
    assert f"vmruntime cannot pass through {closed}," in daemon.log.read_text()
    assert f"chmod o+x {closed}" in daemon.log.read_text()
    closed.chmod(0o711)
    daemon.start()
    daemon.end()


def test_two_daemons_do_not_share_directories(base: Path) -> None:
    with running_daemon(base / "o") as daemon:
        second = Daemon(base / "o2", f'root = "{daemon.root}"\nrun = "{daemon.run}"')
        with pytest.raises(AssertionError, match="another vmruntime daemon uses"):
            second.start()
        daemon.runtime.Version(cri.VersionRequest(), timeout=5)


# --- programs


@pytest.fixture
def path_without(tmp_path: Path) -> Any:
    """Returns a PATH with every program of the host but the named ones."""

    def make(*names: str) -> str:
        directory = tmp_path / "bin"
        directory.mkdir()
        for place in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"):
            for program in Path(place).iterdir():
                link = directory / program.name
                if program.name not in names and not link.exists():
                    link.symlink_to(program)
        return str(directory)

    return make


@pytest.mark.parametrize("program", ["skopeo", "unshare"])
def test_pulls_without_a_program(base: Path, path_without: Any, tmp_path: Path, program: str) -> None:
    daemon = Daemon(base / f"m{os.urandom(2).hex()}")
    daemon.environment["PATH"] = path_without(program)
    source = f"oci:{build_image(tmp_path / 'l', [files({'a': b'a'})])}:image"
    try:
        daemon.start()
        with refused(Code.FAILED_PRECONDITION, program, "not installed", "vmruntime doctor"):
            pull(daemon, source)
    finally:
        daemon.end()


@pytest.mark.parametrize("program", ["mkfs.ext4"])
def test_pods_without_a_program(base: Path, path_without: Any, program: str) -> None:
    daemon = Daemon(base / f"m{os.urandom(2).hex()}")
    daemon.environment["PATH"] = path_without(program)
    try:
        daemon.start()
        with refused(Code.FAILED_PRECONDITION, program, "not installed", "vmruntime doctor"):
            run(daemon)
    finally:
        daemon.end()


def test_qemu_that_goes_away_and_one_that_fails(base: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    qemu = base / "a-qemu"
    real = shutil.which("qemu-system-x86_64")
    qemu.symlink_to(str(real))
    with running_daemon(base / "q", f'[hypervisor]\nqemu = "{qemu}"') as daemon:
        qemu.unlink()
        with refused(Code.INTERNAL, str(qemu), "No such file or directory"):
            run(daemon)
        qemu.write_text("#!/bin/sh\necho 'qemu: no memory for you' >&2\nexit 3\n")
        qemu.chmod(0o755)
        with refused(Code.INTERNAL, "status 3", "qemu: no memory for you"):
            run(daemon)
        qemu.unlink()
        qemu.symlink_to(str(real))
        run(daemon)


# --- the guest


@pytest.fixture
def guest(base: Path) -> Path:
    """A copy of the guest that can be damaged."""
    directory = base / f"g{os.urandom(2).hex()}"
    shutil.copytree(GUEST, directory)
    return directory


def test_a_guest_that_is_not_there(base: Path, guest: Path) -> None:
    with running_daemon(base / "h1", f'[guest]\ndirectory = "{guest}"') as daemon:
        initramfs = (guest / "initramfs.img").rename(guest / "elsewhere")
        conditions = {one.type: one for one in daemon.runtime.Status(cri.StatusRequest()).status.conditions}
        assert not conditions["RuntimeReady"].status
        assert "initramfs.img" in conditions["RuntimeReady"].message
        with refused(Code.FAILED_PRECONDITION, f"{guest}/initramfs.img is missing", "make guest"):
            run(daemon)
        initramfs.rename(guest / "initramfs.img")
        run(daemon)


def test_a_kernel_that_is_none(base: Path, guest: Path) -> None:
    (guest / "vmlinuz").write_bytes(os.urandom(1 << 20))
    extra = f'[guest]\ndirectory = "{guest}"\n[hypervisor]\nboot_timeout = 5.0'
    with running_daemon(base / "h2", extra) as daemon:
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as failed:
            run(daemon)
        assert failed.value.code() in (Code.INTERNAL, Code.UNAVAILABLE)
        assert "kernel" in str(failed.value.details()) or "console" in str(failed.value.details())
        assert time.monotonic() - began < 30


def test_an_initramfs_that_is_none(base: Path, guest: Path) -> None:
    """The kernel panics; QEMU ends with it, so the answer comes long before the time is up."""
    (guest / "initramfs.img").write_bytes(os.urandom(1 << 20))
    with running_daemon(base / "h3", f'[guest]\ndirectory = "{guest}"') as daemon:
        began = time.monotonic()
        with refused(Code.UNAVAILABLE, "the guest did not come up", "panic", "its console said"):
            run(daemon)
        assert time.monotonic() - began < 30


def test_a_guest_that_never_answers(base: Path, guest: Path, tmp_path: Path) -> None:
    """An init that is not the agent: the time is up, and the console's end says what ran instead."""
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "dev").mkdir()
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    (root / "init").write_text("#!/bin/busybox sh\necho this is no agent\nexec /bin/busybox sleep 1000\n")
    (root / "init").chmod(0o755)
    names = "\n".join([".", "init", "bin", "bin/busybox", "dev"])
    archive = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=subprocess.PIPE, check=True
    )
    (guest / "initramfs.img").write_bytes(archive.stdout)
    extra = f'[guest]\ndirectory = "{guest}"\n[hypervisor]\nboot_timeout = 6.0'
    with running_daemon(base / "h4", extra) as daemon:
        with refused(Code.UNAVAILABLE, "did not answer within 6 s", "this is no agent", "boot_timeout"):
            run(daemon)


# --- room


@pytest.fixture
def small_disk(base: Path) -> Iterator[Path]:
    """A file system of 400 MiB for a daemon's persistent root: enough for a pod."""
    root = base / f"r{os.urandom(2).hex()}" / "root"
    root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "none", str(root)], check=True)
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_disk_that_fills_up(small_disk: Path, busybox: str, tmp_path: Path) -> None:
    filler = small_disk / "filler"
    with running_daemon(small_disk.parent) as daemon:
        image = pull(daemon, busybox)
        pod = run_pod(daemon, "here-before")
        container = start(daemon, pod, image, "main", "while true; do echo tick; sleep 0.1; done")
        fill(filler, leave=100 << 20)
        with refused(
            Code.RESOURCE_EXHAUSTED, "no disk space for the pod's writable layer", f"{small_disk}/pods", "free"
        ):
            run(daemon)
        fill(filler, leave=0)
        big = build_image(tmp_path / "l", [files({"big": os.urandom(3 << 20)})])
        with refused(Code.RESOURCE_EXHAUSTED, str(small_disk), "free space"):
            pull(daemon, f"oci:{big}:image")
        with refused(Code.RESOURCE_EXHAUSTED, "no space left for the store", "free space"):
            for number in range(200):  # until the store's file has to grow
                create(daemon, pod, image, f"more-{number}", "true")
        # What runs goes on, and what is asked is answered.
        assert status(daemon, container).state == cri.CONTAINER_RUNNING
        assert sh(daemon, container, "echo here").stdout == b"here\n"
        filler.unlink()
        run(daemon)
        start(daemon, pod, image, "later", "true")


def test_pods_end_on_a_full_disk(small_disk: Path, busybox: str) -> None:
    """Ends are recorded and pods are removed, which is what makes room, also by a daemon that starts on the full disk."""
    with running_daemon(small_disk.parent) as daemon:
        image = pull(daemon, busybox)
        pods = [run_pod(daemon, name) for name in ("one", "two", "three")]
        script = "until test -e /dev/shm/go; do sleep 0.1; done; exit 7"
        one, two, _ = (start(daemon, pod, image, "main", script) for pod in pods)
        fill(small_disk / "filler", leave=0)
        sh(daemon, one, ": >/dev/shm/go")  # not on the disk
        assert wait_exit(daemon, one).exit_code == 7
        with refused(Code.RESOURCE_EXHAUSTED, "no space left for the store", "free space"):
            create(daemon, pods[1], image, "second", "true")
        daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pods[2]), timeout=60)
        fill(small_disk / "filler", leave=0)
        daemon.stop(signal.SIGKILL)
        daemon.start()
        assert (status(daemon, one).exit_code, status(daemon, two).state) == (7, cri.CONTAINER_RUNNING)
        for pod in pods[:2]:
            daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=60)
            fill(small_disk / "filler", leave=0)
            daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=60)
        assert daemon.pods() == frozenset()
        (small_disk / "filler").unlink()
        run(daemon)


def test_a_guest_waits_for_room(small_disk: Path, busybox: str) -> None:
    """What it writes to its disk is not lost, and its disk is not broken: it is held, says so, and goes on."""
    with running_daemon(small_disk.parent) as daemon:
        image = pull(daemon, busybox)
        pod = run_pod(daemon, "writes")
        container = start(daemon, pod, image, "main", "sleep 1000")
        fill(small_disk / "filler", leave=0)
        with refused(Code.UNAVAILABLE, "the pod's VM is held", "no room", "free space"):
            sh(daemon, container, "yes | head -c 40000000 >/written; cat /written >/twice; sync", timeout=30)
        with refused(Code.UNAVAILABLE, "the pod's VM is held"):
            sh(daemon, container, "true")
        found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True))
        assert "no room" in json.loads(found.info["info"])["machine"]["held"]
        daemon.stop(signal.SIGKILL)
        daemon.start()
        assert status(daemon, container).state == cri.CONTAINER_RUNNING
        with refused(Code.UNAVAILABLE, "the pod's VM is held"):
            sh(daemon, container, "true")

        (small_disk / "filler").unlink()
        deadline = time.monotonic() + 60
        if not Path("/dev/vhost-vsock").exists():  # then the helper that stands for it may have locked up
            while (goes := goes_on(daemon, pod, container)) is None:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            if not goes:
                assert "the pod's VM ended" in status(daemon, container).message
                run(daemon, "anew")
                return
        while goes_on(daemon, pod, container) is None:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert sh(daemon, container, "echo more >/more; sync; cat /more").stdout == b"more\n"


def goes_on(daemon: Daemon, pod: str, container: str) -> bool | None:
    """Whether a held pod goes on, with what it had written; None: not decided yet."""
    found = daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    if found.state == cri.SANDBOX_NOTREADY:
        return False
    with contextlib.suppress(grpc.RpcError):
        assert sh(daemon, container, "sync; wc -c </written").stdout == b"40000000\n"
        return True
    return None


def fill(file: Path, leave: int) -> None:
    """Write a file until only `leave` bytes are free beside it."""
    with file.open("ab", buffering=0) as out:
        free = os.statvfs(file.parent).f_bavail * os.statvfs(file.parent).f_frsize
        try:
            while free > leave:
                free -= out.write(bytes(min(1 << 20, free - leave)))
        except OSError:
            return


# --- the network


def plugin(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def chain(base: Path) -> Iterator[tuple[Daemon, Path]]:
    """A daemon whose network ends with a plugin of ours, and the directory of that plugin."""
    directory = base / f"cni{os.urandom(2).hex()}"
    plugin(directory, "ours", "cat >/dev/null")
    daemon = Daemon(base / f"c{os.urandom(2).hex()}", f'[network]\nbin_dirs = ["{directory}", "/usr/lib/cni"]')
    daemon.add_plugin({"type": "ours"})
    plugin(directory, "ours", PASS_ON)
    daemon.start()
    yield daemon, directory
    daemon.end()


PASS_ON = """exec python3 -c '
import json, os, sys
request = json.load(sys.stdin)
if os.environ["CNI_COMMAND"] == "ADD": print(json.dumps(request["prevResult"]))'"""


def failing(command: str, code: int, words: str) -> str:
    answer = f'{{"cniVersion": "1.0.0", "code": {code}, "msg": "{words}"}}'
    return f"if [ $CNI_COMMAND = {command} ]; then echo '{answer}'; exit 1; fi\n{PASS_ON}"


def test_a_network_that_cannot_be_made(chain: tuple[Daemon, Path]) -> None:
    daemon, directory = chain
    plugin(directory, "ours", failing("ADD", 100, "the switch is on fire"))
    with refused(Code.INTERNAL, "ours ADD failed", "the switch is on fire"):
        run(daemon)
    plugin(directory, "ours", failing("ADD", 11, "try again later"))
    with refused(Code.UNAVAILABLE, "ours ADD failed", "try again later"):
        run(daemon)
    plugin(directory, "ours", "echo nonsense; echo words >&2")
    with refused(Code.INTERNAL, "ours ADD answered no JSON"):
        run(daemon)
    (directory / "ours").unlink()
    ready = {one.type: one for one in daemon.runtime.Status(cri.StatusRequest()).status.conditions}["NetworkReady"]
    assert not ready.status
    assert "ours" in ready.message
    with refused(Code.FAILED_PRECONDITION, "plugins not installed: ours", "network.bin_dirs"):
        run(daemon)
    plugin(directory, "ours", PASS_ON)
    run(daemon)


def test_a_network_that_cannot_be_released(chain: tuple[Daemon, Path]) -> None:
    """The stop fails and says so, for kubelet to try again; nothing is forgotten until it succeeds."""
    daemon, directory = chain
    pod = run_pod(daemon, "stuck")
    plugin(directory, "ours", failing("DEL", 100, "the switch does not listen"))
    for _ in range(2):
        with refused(Code.INTERNAL, "ours DEL failed", "the switch does not listen"):
            daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    with refused(Code.INTERNAL, "the switch does not listen"):
        daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert pod in daemon.pods()
    plugin(directory, "ours", PASS_ON)
    daemon.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


def test_a_plugin_outlives_its_daemon(chain: tuple[Daemon, Path]) -> None:
    """It goes on by itself when the daemon is killed; the next daemon waits for its end before it undoes its work."""
    daemon, directory = chain
    # Adds its rules, without a look at the namespace, long after the daemon that asked for them is gone.
    slow = "if [ $CNI_COMMAND = ADD ]; then sleep 2.5; fi\nexec /usr/lib/cni/portmap"
    plugin(directory, "portmap", slow)
    ports = [cri.PortMapping(container_port=80, host_port=18043)]
    config = sandbox_config("slow", daemon.base, port_mappings=ports)
    call = daemon.runtime.RunPodSandbox.future(cri.RunPodSandboxRequest(config=config))
    time.sleep(1.0)
    daemon.stop(signal.SIGKILL)
    daemon.start()
    call.cancel()
    assert daemon.pods() == frozenset()
    time.sleep(3.0)
    assert leaks.settle(daemon.footprint, set()) == []


@pytest.mark.parametrize("restarted", [False, True])
def test_a_failed_pod_whose_network_cannot_be_released_either(chain: tuple[Daemon, Path], restarted: bool) -> None:
    """Nobody knows the id of a pod that did not start, so the daemon itself goes on trying."""
    daemon, directory = chain
    plugin(directory, "ours", 'echo \'{"code": 100, "msg": "no"}\'; exit 1')
    with refused(Code.INTERNAL, "ours ADD failed"):
        run(daemon)
    assert any(one.startswith("store row: resources: network") for one in leaks.find(daemon.footprint))
    if restarted:
        daemon.stop(signal.SIGKILL)
        daemon.start()
    plugin(directory, "ours", PASS_ON)
    assert leaks.settle(daemon.footprint, set()) == []
