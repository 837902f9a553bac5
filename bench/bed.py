"""What benchmarks stand on: an image, a daemon with the settings that a measure wants, and containerd beside it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import grpc

from bench.client import Client
from bench.containerd import Containerd, containerd
from tests.support.daemon import GUEST, Daemon
from tests.support.load import MeasuredDaemon, measured_daemon
from vmruntime.generated import cri_pb2 as cri
from vmruntime.hypervisor.interface import Accelerator
from vmruntime.model.resources import VmSize

ROOT = Path(__file__).resolve().parent.parent
APPLETS = ("sh", "true", "cat", "sleep", "seq", "mkdir", "cp", "ln", "echo", "dd", "httpd", "mknod", "nc", "rm")
IMAGE = "bench.local/image:1"
WARM = 2
SETTLE_SECONDS = 60.0
QUIET_SECONDS = 1.0
"""So long nothing changes when a daemon that chooses for itself how many VMs wait has enough of them."""

Source = Literal["auto", "cold", "template", "warm"]
"""Where pods' VMs come from; "auto": as without any configuration."""

_START = {
    "auto": '[start]\nsource = "auto"\n',
    "cold": '[start]\nsource = "cold"\nwarm = 0\n',
    "template": '[start]\nsource = "template"\nwarm = 0\n',
    "warm": f'[start]\nsource = "auto"\nwarm = {WARM}\n',
}


class Node(Client):
    """A vmruntime daemon.

    Attributes:
        daemon: The daemon, and `measured` the same with its metrics.
        source: Where its pods' VMs come from.
    """

    def __init__(self, channel: grpc.Channel, measured: MeasuredDaemon, layout: Path, source: Source) -> None:
        super().__init__(channel, measured.daemon.base, "")
        self.measured = measured
        self.daemon: Daemon = measured.daemon
        self.source = source
        self.image = self.pull(f"oci:{layout}:1")

    @property
    def accelerator(self) -> Accelerator:
        """How its guests run."""
        return Accelerator(self._status("hypervisor")["accelerator"])

    def settle(self) -> None:
        """Wait until it has nothing to do in the background: the template is made, and as many VMs wait as shall.

        Raises:
            TimeoutError: Not within SETTLE_SECONDS.
        """
        if self.source == "cold":
            return
        end = time.monotonic() + SETTLE_SECONDS
        last, since = self._status("start"), time.monotonic()
        while not self._complete(last) or (self.source == "auto" and time.monotonic() - since < QUIET_SECONDS):
            if time.monotonic() > end:
                raise TimeoutError(f"the daemon does not get ready to start pods ({self.source}): {last}")
            time.sleep(0.02)
            if (now := self._status("start")) != last:
                last, since = now, time.monotonic()

    def source_of(self, pod: str) -> str:
        """Return where a pod's VM came from."""
        return str(self.info(pod)["source"])

    def sources_of(self, pods: Iterable[str]) -> dict[str, int]:
        """Return how many pods' VMs came from where."""
        return dict(sorted(Counter(self.source_of(pod) for pod in pods).items()))

    def _complete(self, start: dict[str, Any]) -> bool:
        """Whether all is there that starts need, as far as it is known what that is."""
        templates = start.get("templates", {}).values()
        if "building" in templates or self.source == "auto":
            return "building" not in templates
        return "ready" in templates and (self.source != "warm" or start["warm"] >= WARM)

    def _status(self, key: str) -> dict[str, Any]:
        status = self.runtime.Status(cri.StatusRequest(verbose=True))
        found: dict[str, Any] = json.loads(status.info.get(key, "{}"))
        return found


class Bed:
    """An image, containerd, and one daemon at a time, so that none disturbs another.

    Attributes:
        base: A directory for whatever a measure needs.
        guest: Directory of kernel and initramfs.
        layout: OCI layout of the image, in which it is called "1".
    """

    def __init__(self, base: Path, stack: contextlib.ExitStack) -> None:
        self.base = base
        self.guest = Path(GUEST)
        self.layout = base / "image"
        self._stack = stack
        self._daemon = stack.enter_context(contextlib.ExitStack())
        self._node: tuple[Node, str] | None = None
        self._peer: Containerd | None = None
        self._client: Client | None = None
        self._count = 0
        _build_image(self.layout)

    def node(self, source: Source = "auto", extra: str = "") -> Node:
        """Return a daemon with some settings; one with others is ended first.

        Args:
            source: Where its pods' VMs come from.
            extra: More configuration, as TOML.
        """
        settings = _START[source] + extra
        if self._node is not None and self._node[0].source == source and self._node[1] == settings:
            return self._node[0]
        self.rest()
        self._count += 1
        measured = self._daemon.enter_context(measured_daemon(self.base / f"d{self._count}", extra=settings))
        channel = self._daemon.enter_context(grpc.insecure_channel(f"unix:{measured.daemon.socket}"))
        self._node = Node(channel, measured, self.layout, source), settings
        self._node[0].settle()
        return self._node[0]

    @property
    def guest_kernel(self) -> str:
        """The release of the guest's kernel."""
        about = self.guest / "guest.json"
        return str(json.loads(about.read_text())["kernel_release"]) if about.exists() else "unknown"

    def rest(self) -> None:
        """End the daemon, so that it is not in the way of a measure that brings its own."""
        self._node = None
        self._daemon.close()

    @property
    def containerd(self) -> Client:
        """A client of containerd, which starts at the first use and stays."""
        if self._client is None:
            self._peer = self._stack.enter_context(containerd(self.base / "c"))
            self._peer.add_image(self.layout, "1", IMAGE)
            self._client = self._peer.client(IMAGE)
        return self._client

    def size(self) -> VmSize:
        """Return the size of a VM of a pod without limits, as the settings have it."""
        return VmSize(vcpus=1, memory_mib=512, max_vcpus=os.cpu_count() or 1, max_memory_mib=24 * 1024)


@contextlib.contextmanager
def bed() -> Iterator[Bed]:
    """Yield a bed; afterwards nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as name:
        base = Path(name)
        base.chmod(0o755)  # VMs run unprivileged and pass through
        with contextlib.ExitStack() as stack:
            yield Bed(base, stack)


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
