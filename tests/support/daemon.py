"""A daemon of its own for tests and benchmarks, and plain gRPC stubs to talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from tests.support import leaks
from vmruntime.generated import cri_pb2, cri_pb2_grpc
from vmruntime.network import conf as network_conf

START_SECONDS = 60.0
GUEST = os.environ.get("VMRUNTIME_GUEST", "/var/lib/vmruntime/guest")
AGENT = os.environ.get("VMRUNTIME_AGENT", "")
"""The agent of host pods; empty: the installed one."""


class Daemon:
    """A `vmruntime serve` with its own directories, network and parent cgroup; the guest is the installed one.

    No VMs wait for pods, so that what a test sees is its own.

    Attributes:
        base: Everything of it is below here.
        footprint: Where the leak check looks.
        environment: Variables of the daemon besides those of the tests; changes count from the next start on.
    """

    def __init__(
        self, base: Path, extra: str = "", *, built_in_network: bool = False, module: str = "vmruntime.daemon"
    ) -> None:
        """Write the configuration.

        Args:
            base: Is made; short, because unix socket paths are, and no other daemon's, now or before.
            extra: More configuration, as TOML; it overrides what is written here, key by key.
            built_in_network: Use the bridge that daemons without a CNI configuration share.
            module: What to run; tests.support.fake_daemon is a daemon without VMs.

        Raises:
            FileExistsError: A daemon has been there: its images and records would become this one's.
        """
        self._module = module
        self.base = base
        self.run = base / "run"
        self.root = base / "root"
        self.config = base / "config.toml"
        self.log = base / "daemon.log"
        self.environment: dict[str, str] = {}
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)
        name = f"vt{secrets.token_hex(4)}"
        settings: dict[str, Any] = {
            "root": str(self.root),
            "run": str(self.run),
            "cgroup_parent": f"/{name}",
            "guest": {"directory": GUEST},
            "start": {"source": "template"},
            "host": {"agent": AGENT},
            "log": {"level": "debug"},
        }
        if not built_in_network:
            settings["network"] = {"conf_dir": str(write_network(base, name).parent)}
        settings = _merged(settings, tomllib.loads(extra))
        with self.config.open("x") as file:
            file.write(toml(settings))
        self.footprint = leaks.Footprint(
            base=base,
            root=self.root,
            run=self.run,
            log=self.log,
            cgroup_parent=settings["cgroup_parent"],
            network=network_conf.DEFAULT_NAME if built_in_network else name,
            bridge="" if built_in_network else name,
            reservations=Path("/var/lib/cni/networks") if built_in_network else base / "ipam",
            pid=lambda: self._process.pid if self._process is not None else None,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def socket(self) -> Path:
        """The CRI socket."""
        return self.run / "vmruntime.sock"

    @property
    def pid(self) -> int:
        """The daemon's pid."""
        assert self._process is not None
        return self._process.pid

    def add_plugin(self, plugin: Mapping[str, Any]) -> None:
        """Append a plugin to the daemon's network."""
        path = self.base / "net.d" / "10-test.conflist"
        conf = json.loads(path.read_text())
        conf["plugins"].append(plugin)
        path.write_text(json.dumps(conf))

    def exit_status(self) -> int | None:
        """Return how the daemon ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the daemon and wait until it answers Version."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        self._channel = grpc.insecure_channel(f"unix:{self.socket}")
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise AssertionError(f"the daemon ended: {self.log.read_text()[-3000:]}")
            with contextlib.suppress(grpc.RpcError):
                self.runtime.Version(cri_pb2.VersionRequest(), timeout=1, wait_for_ready=True)
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"the daemon does not answer: {self.log.read_text()[-3000:]}")

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """End the daemon; its pods go on."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.send_signal(sig)
            self._process.wait(30)
            self._process = None

    def pods(self) -> frozenset[str]:
        """Return the ids of all pods."""
        return frozenset(pod.id for pod in self.runtime.ListPodSandbox(cri_pb2.ListPodSandboxRequest()).items)

    def containers(self) -> frozenset[str]:
        """Return the ids of all containers."""
        return frozenset(one.id for one in self.runtime.ListContainers(cri_pb2.ListContainersRequest()).containers)

    def remove_all_but(self, pods: frozenset[str], containers: frozenset[str] = frozenset()) -> None:
        """Remove every other pod and, in these pods, every other container; none has any time to end by itself."""
        for container in self.containers() - containers:
            with contextlib.suppress(grpc.RpcError):  # its pod ends all the same
                self.runtime.StopContainer(cri_pb2.StopContainerRequest(container_id=container, timeout=0), timeout=20)
        for pod in self.pods() - pods:
            self.runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=60)
        for container in self.containers() - containers:
            self.runtime.RemoveContainer(cri_pb2.RemoveContainerRequest(container_id=container), timeout=60)

    def end(self) -> None:
        """Remove every pod, stop the daemon, and fail if it left anything on the host."""
        try:
            if self._process is not None and self._process.poll() is None:
                self.remove_all_but(frozenset())
                leaks.settle(self.footprint, set())
                self.stop()
            left = leaks.settle(self.footprint, set())
        finally:
            if self._process is not None:
                self.stop(signal.SIGKILL)
            if self.footprint.bridge:
                delete = ["ip", "link", "delete", self.footprint.bridge]
                subprocess.run(delete, stderr=subprocess.DEVNULL, check=False)
        assert not left, "the daemon left behind:\n  " + "\n  ".join(left)

    @property
    def runtime(self) -> Any:
        """The RuntimeService stub."""
        assert self._channel is not None
        return cri_pb2_grpc.RuntimeServiceStub(self._channel)

    @property
    def images(self) -> Any:
        """The ImageService stub."""
        assert self._channel is not None
        return cri_pb2_grpc.ImageServiceStub(self._channel)


@contextlib.contextmanager
def running_daemon(
    base: Path, extra: str = "", *, built_in_network: bool = False, module: str = "vmruntime.daemon"
) -> Iterator[Daemon]:
    """Yield a started daemon; at the end its pods are removed, it is stopped, and nothing of it may be left.

    Args:
        base, extra, built_in_network, module: See Daemon.
    """
    daemon = Daemon(base, extra, built_in_network=built_in_network, module=module)
    try:
        daemon.start()
        yield daemon
    except BaseException:
        with contextlib.suppress(Exception):  # the failure that led here is the one to report
            daemon.end()
        raise
    daemon.end()


def write_network(base: Path, name: str, **plugin: Any) -> Path:
    """Write the CNI configuration of a network nobody else uses, and return the file.

    Args:
        base: Holds the configuration, in net.d, and the address reservations, in ipam.
        name: Of the network and of its bridge; at most 15 characters (interface names).
        plugin: More keys of the bridge plugin.
    """
    # A /24 of 10.128.0.0/9, which leaves the built-in network and those of most hosts alone.
    number = secrets.randbelow(2**15)
    subnet = f"10.{128 + number // 256}.{number % 256}.0/24"
    conf = network_conf.default(subnet)
    bridge = {**conf.plugins[0], "bridge": name, **plugin}
    bridge["ipam"] = {**bridge["ipam"], "dataDir": str(base / "ipam")}
    path = base / "net.d" / "10-test.conflist"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"cniVersions": conf.offered, "name": name, "plugins": [bridge, *conf.plugins[1:]]}
    path.write_text(json.dumps(text, indent=1))
    return path


def toml(settings: Mapping[str, Any]) -> str:
    """Return settings as TOML: plain values first, then a table for each mapping."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, Mapping)]
    tables = [f"[{key}]\n{toml(value)}" for key, value in settings.items() if isinstance(value, Mapping)]
    return "\n".join([*plain, *tables]) + "\n"


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


def sandbox_config(name: str, base: Path, **fields: Any) -> Any:
    """Return a PodSandboxConfig with a name, a log directory and what else is given."""
    fields.setdefault("linux", cri_pb2.LinuxPodSandboxConfig())
    return cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="test", attempt=0),
        log_directory=str(base / "logs" / name),
        **fields,
    )


def container_config(name: str, image: str, command: list[str], **fields: Any) -> Any:
    """Return a ContainerConfig with a log file NAME.log; each container has a PID namespace of its own."""
    namespaces = cri_pb2.NamespaceOption(pid=cri_pb2.NamespaceMode.CONTAINER)
    security = cri_pb2.LinuxContainerSecurityContext(namespace_options=namespaces)
    fields.setdefault("linux", cri_pb2.LinuxContainerConfig(security_context=security))
    return cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=name, attempt=0),
        image=cri_pb2.ImageSpec(image=image),
        command=command,
        log_path=f"{name}.log",
        **fields,
    )
