"""What benchmarks stand on: a daemon of their own, an image, and the CRI calls they time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.daemon import GUEST, Daemon, container_config, sandbox_config
from tests.support.load import MeasuredDaemon, measured_daemon
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.resources import VmSize

ROOT = Path(__file__).resolve().parent.parent
APPLETS = ("sh", "true", "cat", "sleep", "seq", "mkdir", "cp", "ln", "echo", "dd", "httpd")


class Bed:
    """A daemon and an image with BusyBox and a static crun. Its methods may be called from several threads.

    Attributes:
        measured: The daemon with its metrics.
        guest: Directory of kernel and initramfs.
        image: Reference of the image.
    """

    def __init__(self, measured: MeasuredDaemon, base: Path) -> None:
        self.measured = measured
        self.daemon: Daemon = measured.daemon
        self.base = base
        self.guest = Path(GUEST)
        self._numbers = itertools.count(1)
        self._configs: dict[str, Any] = {}
        layout = base / "image"
        _build_image(layout)
        self.image = str(self.pull(f"oci:{layout}:1"))

    @property
    def accelerator(self) -> str:
        """How the daemon's guests run."""
        status = self.daemon.runtime.Status(cri.StatusRequest(verbose=True))
        return str(json.loads(status.info["hypervisor"])["accelerator"])

    def pull(self, reference: str) -> str:
        """Pull an image; return the reference to use."""
        request = cri.PullImageRequest(image=cri.ImageSpec(image=reference))
        return str(self.daemon.images.PullImage(request, timeout=600).image_ref)

    def run_pod(self, *, privileged: bool = False) -> str:
        """Start a sandbox and return its id; a privileged one may have privileged containers."""
        config = sandbox_config(f"bench-{next(self._numbers)}", self.base)
        config.linux.security_context.privileged = privileged
        pod = str(self.daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)
        self._configs[pod] = config
        return pod

    def info(self, pod: str) -> dict[str, Any]:
        """Return a sandbox's verbose information."""
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
        found: dict[str, Any] = json.loads(self.daemon.runtime.PodSandboxStatus(request).info["info"])
        return found

    def remove_pod(self, pod: str) -> None:
        """Remove a sandbox."""
        self.daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
        del self._configs[pod]

    def create(self, pod: str, name: str, command: list[str], *, privileged: bool = False) -> str:
        """Create a container."""
        config = container_config(name, self.image, command)
        config.linux.security_context.privileged = privileged
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=self._configs[pod])
        return str(self.daemon.runtime.CreateContainer(request).container_id)

    def start(self, container: str) -> None:
        """Start a container."""
        self.daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))

    def remove(self, container: str) -> None:
        """Remove a container."""
        self.daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))

    def exec(self, container: str, script: str) -> str:
        """Run a shell script in a container and return what it wrote."""
        request = cri.ExecSyncRequest(container_id=container, cmd=["/bin/sh", "-c", script], timeout=120)
        answer = self.daemon.runtime.ExecSync(request)
        if answer.exit_code != 0:
            raise RuntimeError(f"{script}: {answer.stderr.decode()}")
        return str(answer.stdout.decode())

    def log(self, pod: str, name: str) -> Path:
        """Return where a container's log is."""
        return Path(self._configs[pod].log_directory) / f"{name}.log"

    def size(self) -> VmSize:
        """Return the size of a VM of a pod without limits, as the settings have it."""
        return VmSize(vcpus=1, memory_mib=512, max_vcpus=os.cpu_count() or 1, max_memory_mib=24 * 1024)


@contextlib.contextmanager
def bed() -> Iterator[Bed]:
    """Yield a bed; afterwards nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as name:
        base = Path(name)
        base.chmod(0o755)  # VMs run unprivileged and pass through
        with measured_daemon(base / "d") as measured:
            yield Bed(measured, base)


def timed(work: Any, *arguments: Any) -> tuple[float, Any]:
    """Call something; return milliseconds and its result."""
    began = time.monotonic()
    result = work(*arguments)
    return (time.monotonic() - began) * 1000, result


def _build_image(layout: Path) -> None:
    """Make an OCI layout with BusyBox, crun, and an OCI bundle for crun at /bundle."""
    bundle = layout.parent / "image-bundle"

    def umoci(*arguments: str) -> None:
        subprocess.run(["umoci", *arguments], check=True, capture_output=True)

    umoci("init", "--layout", str(layout))
    umoci("new", "--image", f"{layout}:1")
    umoci("unpack", "--image", f"{layout}:1", str(bundle))
    root = bundle / "rootfs"
    for where in (root, root / "bundle" / "rootfs"):
        (where / "bin").mkdir(parents=True)
        shutil.copy("/bin/busybox", where / "bin" / "busybox")
        for applet in APPLETS:
            (where / "bin" / applet).symlink_to("busybox")
    crun = ROOT / "build" / "crun"
    shutil.copy(crun if crun.exists() else Path(shutil.which("crun") or ""), root / "bin" / "crun")
    (root / "bundle" / "config.json").write_text(json.dumps(_bare_config()))
    umoci("repack", "--image", f"{layout}:1", str(bundle))


def _bare_config() -> dict[str, Any]:
    """Return the smallest configuration that isolates as a container of a pod is isolated."""
    capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {
            "args": ["/bin/true"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin"],
            "capabilities": {kind: capabilities for kind in ("bounding", "effective", "permitted")},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}]},
    }
