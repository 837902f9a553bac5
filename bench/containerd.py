"""The peer that users would take instead: containerd and runc with a pause container, called by the same CRI client.

It runs in a directory of its own, beside any containerd that the host has, on a bridge of its own that the same CNI
plugins make by the same configuration as vmruntime's. Its pause image is made here, so it needs no registry.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from bench.client import Client
from tests.support import leaks, registry
from tests.support.daemon import write_network
from vmruntime.config.settings import NetworkSettings
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import cri_pb2_grpc

PROGRAMS = ("containerd", "containerd-shim-runc-v2", "ctr", "runc")
PAUSE = "bench.local/pause:1"
START_SECONDS = 60.0
END_SECONDS = 30.0
SHIM_SOCKETS = Path("/run/containerd/s")
"""Built into containerd."""


class Containerd:
    """A containerd with its own directories, network and parent cgroup.

    Attributes:
        footprint: Where to look for what it has on the host.
    """

    def __init__(self, base: Path) -> None:
        """Write the configuration, the network's too; `base` is made and must be short, for unix sockets."""
        base.mkdir(parents=True)
        self._name = f"vb{secrets.token_hex(4)}"
        self._base = base
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        network = write_network(base, self._name)
        (base / "certs.d").mkdir()
        (base / "config.toml").write_text(config_text(base, network.parent, cni_directory()))
        self.footprint = leaks.Footprint(
            base=base,
            root=base / "root",
            run=base / "run",
            log=base / "containerd.log",
            cgroup_parent=f"/{self._name}",
            network=self._name,
            bridge=self._name,
            reservations=base / "ipam",
            pid=lambda: self._process.pid if self._process is not None else None,
        )

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self._base / "run" / "containerd.sock"

    def client(self, image: str) -> Client:
        """Return a client of it, whose containers are made of an image that has been imported or pulled."""
        assert self._channel is not None
        return Client(self._channel, self._base, image, cgroup_parent=self.footprint.cgroup_parent)

    def start(self) -> None:
        """Start it and wait until its CRI is ready.

        Raises:
            RuntimeError: It ended, or is not ready after START_SECONDS.
        """
        with self.footprint.log.open("ab") as log:
            argv = ["containerd", "--config", str(self._base / "config.toml")]
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._channel = grpc.insecure_channel(f"unix:{self.socket}")
        runtime = cri_pb2_grpc.RuntimeServiceStub(self._channel)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(grpc.RpcError):
                answer = runtime.Status(cri.StatusRequest(), timeout=5, wait_for_ready=True)
                if all(condition.status for condition in answer.status.conditions):
                    return
            time.sleep(0.05)
        raise RuntimeError(f"containerd is not ready: {self.footprint.log.read_text()[-3000:]}")

    def add_image(self, layout: Path, tag: str, name: str) -> None:
        """Import an image of an OCI layout under a name."""
        archive = self._base / "image.tar"
        skopeo = ["skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{layout}:{tag}"]
        subprocess.run([*skopeo, f"docker-archive:{archive}:{name}"], check=True)
        ctr = ["ctr", "--address", str(self.socket), "--namespace", "k8s.io"]
        subprocess.run([*ctr, "images", "import", str(archive)], check=True, stdout=subprocess.DEVNULL)
        archive.unlink()

    def end(self) -> None:
        """Remove every pod, stop it, and take away by force what is left of it.

        Raises:
            RuntimeError: Something had to be taken away by force.
        """
        try:
            if self._process is not None:
                try:
                    self._remove_pods()
                except grpc.RpcError:  # it has died or hangs, and only a containerd knows how to remove its pods
                    self._stop()
                    self.start()
                    self._remove_pods()
        finally:
            self._stop()
            left = self._settle()
            self._clear()
        if left:
            raise RuntimeError("containerd left behind:\n  " + "\n  ".join(left))

    def _remove_pods(self) -> None:
        assert self._channel is not None
        runtime = cri_pb2_grpc.RuntimeServiceStub(self._channel)
        for pod in runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items:
            runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=END_SECONDS)
            runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=END_SECONDS)

    def _stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _settle(self) -> list[str]:
        """Return what is left of the pods; shims may take a moment to end."""
        end = time.monotonic() + END_SECONDS
        while (left := self._left()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def _left(self) -> list[str]:
        footprint = self.footprint
        ids = footprint.ids()
        kinds = {
            "process": leaks.processes(footprint, ids),
            "link": leaks.links(footprint),
            "mount": leaks.mounts(footprint, ids),
            "unix socket": leaks.sockets(footprint),
            "cgroup": leaks.cgroups(footprint, ids),
            "packet filter rule": leaks.rules(footprint, ids),
            "address reservation": leaks.reservations(footprint, ids),
        }
        return sorted(f"{kind}: {what}" for kind, found in kinds.items() for what in found)

    def _clear(self) -> None:
        """End processes, and remove mounts, sockets, cgroups, the bridge and its rules, whether or not anything should be left."""
        for _ in range(2):  # shims first: a shim that sees its container end has work to do yet
            for line in leaks.processes(self.footprint, self.footprint.ids()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line.split()[0]), signal.SIGKILL)
            time.sleep(0.05)
        for address in (self._base / "run").glob("io.containerd.runtime.v2.task/*/*/address"):
            Path(address.read_text().removeprefix("unix://")).unlink(missing_ok=True)
        for point in sorted(leaks.mounts(self.footprint, set()), reverse=True):
            subprocess.run(["umount", "--lazy", point], stderr=subprocess.DEVNULL, check=False)
        for hierarchy in leaks.hierarchies():
            parent = hierarchy / self._name
            for path in sorted((path for path in parent.rglob("*/") if path.is_dir()), reverse=True):
                _remove_empty(path)
            _remove_empty(parent)
        subprocess.run(["ip", "link", "delete", self._name], stderr=subprocess.DEVNULL, check=False)
        self._clear_rules()
        _remove_empty(SHIM_SOCKETS)
        _remove_empty(SHIM_SOCKETS.parent)

    def _clear_rules(self) -> None:
        """Remove what the bridge plugin's masquerading left: rules, and then the chains that they led to."""
        iptables = ["iptables", "--wait", "--table", "nat"]
        found = list(leaks.rules(self.footprint, self.footprint.ids()))
        for rule in (shlex.split(line) for line in found if line.startswith("-A ")):
            subprocess.run([*iptables, "-D", *rule[1:]], stderr=subprocess.DEVNULL, check=False)
        for chain in (line[1:].split()[0] for line in found if line.startswith(":")):
            subprocess.run([*iptables, "-X", chain], stderr=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def containerd(base: Path) -> Iterator[Containerd]:
    """Yield a containerd that runs and has its pause image; afterwards nothing of it is left.

    Raises:
        RuntimeError: A program is missing, it does not become ready, or it left something on the host.
    """
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise RuntimeError(f"{', '.join(missing)}: not found; `make bench-setup` installs containerd and runc")
    peer = Containerd(base)
    try:
        peer.start()
        peer.add_image(build_pause(base / "pause"), "image", PAUSE)
        yield peer
    except BaseException:
        with contextlib.suppress(Exception):  # the failure that led here is the one to report
            peer.end()
        raise
    peer.end()


def config_text(base: Path, conf_dir: Path, bin_dir: str) -> str:
    """Return the configuration of a containerd that keeps everything below `base`.

    Args:
        base: Its directory.
        conf_dir: Where the network's configuration is.
        bin_dir: Where the CNI plugins are.
    """
    tables: dict[str, dict[str, str | bool]] = {
        "grpc": {"address": str(base / "run" / "containerd.sock")},
        'plugins."io.containerd.internal.v1.opt"': {"path": str(base / "opt")},
        'plugins."io.containerd.grpc.v1.cri"': {
            "sandbox_image": PAUSE,
            "netns_mounts_under_state_dir": True,
            "restrict_oom_score_adj": True,  # else it wants CAP_SYS_RESOURCE, which root in a container has not
        },
        'plugins."io.containerd.grpc.v1.cri".cni': {"conf_dir": str(conf_dir), "bin_dir": bin_dir},
        'plugins."io.containerd.grpc.v1.cri".registry': {"config_path": str(base / "certs.d")},
        'plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc': {"runtime_type": "io.containerd.runc.v2"},
        # No systemd: cgroups are made as files, which is the default, as vmruntime makes them.
        'plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options': {"Root": str(base / "runc")},
    }
    lines = ["version = 2", f"root = {json.dumps(str(base / 'root'))}", f"state = {json.dumps(str(base / 'run'))}"]
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def cni_directory() -> str:
    """Return where the CNI plugins are that vmruntime uses by default.

    Raises:
        RuntimeError: Nowhere.
    """
    directories = NetworkSettings().bin_dirs
    for directory in directories:
        if (Path(directory) / "bridge").exists():
            return directory
    raise RuntimeError(f"no CNI plugins in {', '.join(directories)}; `make setup` installs them")


def build_pause(directory: Path) -> Path:
    """Make an image of a static program that waits; return its OCI layout, in which it is called "image"."""
    directory.mkdir()
    source, program = Path(__file__).with_name("pause.c"), directory / "pause"
    subprocess.run(["gcc", "-Os", "-static", "-s", "-o", str(program), str(source)], check=True)
    info, content = registry.member("pause", program.read_bytes())
    info.mode = 0o755
    return registry.build_image(
        directory / "layout", [registry.layer([(info, content)])], config={"Entrypoint": ["/pause"]}
    )


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
