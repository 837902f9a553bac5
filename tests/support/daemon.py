"""A daemon of its own for tests and benchmarks, and plain gRPC stubs to talk to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from vmruntime.generated import cri_pb2, cri_pb2_grpc

START_SECONDS = 60.0


class Daemon:
    """A `vmruntime serve` with its own directories; the guest is the installed one."""

    def __init__(self, base: Path, extra: str = "") -> None:
        self.base = base
        # Unix socket paths are short, and pytest's directories are not.
        self.run = base / "run"
        self.root = base / "root"
        self.config = base / "config.toml"
        self.log = base / "daemon.log"
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)
        guest = os.environ.get("VMRUNTIME_GUEST", "/var/lib/vmruntime/guest")
        self.config.write_text(
            f'root = "{self.root}"\nrun = "{self.run}"\n{extra}\n[guest]\ndirectory = "{guest}"\n'
            '[log]\nlevel = "debug"\n'
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

    def start(self) -> None:
        """Start the daemon and wait until it answers Version."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vmruntime.daemon", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
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

    def remove_everything(self, keep: frozenset[str] = frozenset()) -> None:
        """Remove every pod through CRI, but for those to keep."""
        for pod in self.pods() - keep:
            self.runtime.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=60)

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
def running_daemon(base: Path, extra: str = "") -> Iterator[Daemon]:
    """Yield a started daemon; at the end its pods are removed and it is stopped."""
    daemon = Daemon(base, extra)
    try:
        daemon.start()
        yield daemon
    finally:
        if daemon._process is not None:
            with contextlib.suppress(grpc.RpcError):
                daemon.remove_everything()
            daemon.stop()


def sandbox_config(name: str, base: Path, **fields: Any) -> Any:
    """Return a PodSandboxConfig with a name, a log directory and what else is given."""
    return cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="test", attempt=0),
        log_directory=str(base / "logs" / name),
        linux=cri_pb2.LinuxPodSandboxConfig(),
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
