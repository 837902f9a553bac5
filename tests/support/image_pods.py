"""Image pods through a daemon's CRI socket, for tests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.daemon import Daemon, running_daemon, sandbox_config
from vmruntime.generated import cri_pb2 as cri

BOOT_SECONDS = 120.0
"""A guest that starts on a busy host without hardware virtualisation."""

KIND = {"vmruntime.io/kind": "image"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """An image pod with its container, started."""

    daemon: Daemon
    name: str
    pod: str
    container: str

    @property
    def ip(self) -> str:
        """The pod's address."""
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=self.pod)
        return str(self.daemon.runtime.PodSandboxStatus(request).status.network.ip)

    @property
    def directory(self) -> Path:
        """Where its sockets and logs are."""
        return self.daemon.run / "sandboxes" / self.pod[:13]

    def info(self) -> dict[str, Any]:
        """Return the verbose information of the pod."""
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=self.pod, verbose=True)
        found: dict[str, Any] = json.loads(self.daemon.runtime.PodSandboxStatus(request).info["info"])
        return found

    def status(self) -> Any:
        """Return the container's status."""
        request = cri.ContainerStatusRequest(container_id=self.container)
        return self.daemon.runtime.ContainerStatus(request).status

    def log(self) -> str:
        """Return what the container's log says, without times and tags; lines joined as they were."""
        text = ""
        path = self.daemon.base / "logs" / self.name / "vm.log"
        for line in path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.exists() else []:
            _, _, tag, said = line.split(" ", 3)
            text += said + ("\n" if tag == "F" else "")
        return text

    def wait_for_log(self, text: str, *, times: int = 1) -> None:
        """Wait until the log has a text, so many times."""
        wait_until(
            lambda: self.log().count(text) >= times, lambda: f"{text!r} is not in the log:\n{self.log()[-3000:]}"
        )

    def wait_exit(self, seconds: float = BOOT_SECONDS) -> Any:
        """Wait until the container has ended and return its status."""
        wait_until(
            lambda: self.status().state == cri.CONTAINER_EXITED, lambda: f"still runs: {self.log()[-2000:]}", seconds
        )
        return self.status()

    def exec(self, *command: str, timeout: int = 30) -> Any:
        """Run a command in the guest."""
        request = cri.ExecSyncRequest(container_id=self.container, cmd=command, timeout=timeout)
        return self.daemon.runtime.ExecSync(request)

    def out(self, script: str) -> str:
        """Run a shell script in the guest that succeeds, and return what it wrote."""
        done = self.exec("/bin/sh", "-c", script)
        assert done.exit_code == 0, done
        return str(done.stdout.decode()).strip()

    def wait_agent(self, seconds: float = BOOT_SECONDS) -> None:
        """Wait until the guest's agent answers."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Exception):
                if self.exec("true", timeout=5).exit_code == 0:
                    return
            assert self.status().state == cri.CONTAINER_RUNNING, (self.status().message, self.log()[-3000:])
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.3)

    def stop(self, grace: int) -> None:
        """Stop the container."""
        request = cri.StopContainerRequest(container_id=self.container, timeout=grace)
        self.daemon.runtime.StopContainer(request, timeout=grace + 60)

    def again(self) -> Machine:
        """Make and start the next container of the pod, as kubelet does when one has ended."""
        attempt = self.status().metadata.attempt + 1
        image = self.status().image.image
        container = create(self.daemon, self.pod, self.name, image, attempt=attempt)
        start(self.daemon, container)
        return dataclasses.replace(self, container=container)


def wait_until(true: Callable[[], bool], why: Callable[[], str], seconds: float = BOOT_SECONDS) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


@contextlib.contextmanager
def image_daemon(base: Path, names: Mapping[str, str], extra: str = "") -> Iterator[Daemon]:
    """Yield a daemon that knows VM images: names to URLs."""
    base.mkdir(parents=True, exist_ok=True)
    rules = base / "images.d"
    rules.mkdir()
    translations = [{"name": name, "url": url} for name, url in names.items()]
    (rules / "test.json").write_text(json.dumps({"translations": translations}))
    with running_daemon(base / "d", f'[images]\ntranslations_dir = "{rules}"\n{extra}') as daemon:
        yield daemon


def pull(daemon: Daemon, image: str, **annotations: str) -> str:
    """Pull a VM image and return the reference to use."""
    config = sandbox_config("pull", daemon.base, annotations={**KIND, **annotations})
    request = cri.PullImageRequest(image=cri.ImageSpec(image=image), sandbox_config=config)
    return str(daemon.images.PullImage(request, timeout=300).image_ref)


def run_pod(daemon: Daemon, name: str, annotations: Mapping[str, str] | None = None, **fields: Any) -> str:
    """Run the sandbox of an image pod and return its id."""
    config = sandbox_config(name, daemon.base, annotations={**KIND, **(annotations or {})}, **fields)
    return str(daemon.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)


def create(daemon: Daemon, pod: str, name: str, image: str, *, attempt: int = 0, **fields: Any) -> str:
    """Create the container of an image pod and return its id."""
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="vm", attempt=attempt),
        image=cri.ImageSpec(image=image),
        log_path="vm.log",
        **fields,
    )
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config(name, daemon.base)
    )
    return str(daemon.runtime.CreateContainer(request).container_id)


def start(daemon: Daemon, container: str) -> None:
    """Start a container."""
    daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))


def boot(
    daemon: Daemon,
    name: str,
    image: str,
    annotations: Mapping[str, str] | None = None,
    pod_fields: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Machine:
    """Run an image pod, and let its machine boot."""
    pod = run_pod(daemon, name, annotations, **(pod_fields or {}))
    container = create(daemon, pod, name, image, **fields)
    start(daemon, container)
    return Machine(daemon, name, pod, container)


def up_and_down(daemon: Daemon, name: str, image: str) -> None:
    """Boot the small image, see its guest come up, and shut it down."""
    machine = boot(daemon, name, image)
    machine.wait_agent()
    assert machine.out("hostname") == name
    machine.wait_for_log("small: up after")
    machine.stop(60)
    ended = machine.status()
    assert (ended.exit_code, ended.reason) == (0, "Completed"), ended.message


def ssh_key(directory: Path) -> tuple[Path, str]:
    """Make an SSH key; return the private one's file and the public one."""
    key = directory / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return key, key.with_suffix(".pub").read_text().strip()


def ssh(key: Path, address: str, command: str, user: str = "root", *, via: str = "") -> str:
    """Run a command in a guest over ssh, trying until its server is up.

    Args:
        key, address, command, user: As ssh has them.
        via: A command that connects its input and output to the server, else ssh does itself.
    """
    argv = ["ssh", "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    argv += ["-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30", f"{user}@{address}", command]
    argv[1:1] = ["-o", f"ProxyCommand={via}"] if via else []
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        done = subprocess.run(argv, capture_output=True, check=False, timeout=60)
        if done.returncode == 0:
            return done.stdout.decode()
        assert time.monotonic() < deadline, done.stderr.decode()
        time.sleep(0.5)
