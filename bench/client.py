"""The CRI calls that benchmarks time, the same for every runtime: vmruntime and its peers."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from tests.support.daemon import container_config, sandbox_config
from vmruntime.generated import cri_pb2 as cri
from vmruntime.generated import cri_pb2_grpc

PULL_SECONDS = 600.0
LINE_SECONDS = 60.0


class Client:
    """A runtime behind a CRI socket. Its methods may be called from several threads.

    Attributes:
        runtime, images: The stubs.
        image: Reference of the image that containers are made of.
    """

    def __init__(self, channel: grpc.Channel, base: Path, image: str, *, cgroup_parent: str = "") -> None:
        """Remember where to call.

        Args:
            channel: To the socket.
            base: Holds the logs of pods.
            image: What containers are made of.
            cgroup_parent: Of pods, as kubelet gives one; empty: the runtime's own.
        """
        self.runtime: Any = cri_pb2_grpc.RuntimeServiceStub(channel)
        self.images: Any = cri_pb2_grpc.ImageServiceStub(channel)
        self.image = image
        self._base = base
        self._cgroup_parent = cgroup_parent
        self._numbers = itertools.count(1)
        self._configs: dict[str, Any] = {}

    def pull(self, reference: str) -> str:
        """Pull an image; return the reference to use."""
        request = cri.PullImageRequest(image=cri.ImageSpec(image=reference))
        return str(self.images.PullImage(request, timeout=PULL_SECONDS).image_ref)

    def remove_image(self, reference: str) -> None:
        """Remove an image."""
        self.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=reference)))

    def run_pod(self, *, privileged: bool = False) -> str:
        """Start a sandbox and return its id; a privileged one may have privileged containers."""
        config = sandbox_config(f"bench-{next(self._numbers)}", self._base)
        config.linux.security_context.privileged = privileged
        config.linux.cgroup_parent = self._cgroup_parent
        pod = str(self.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)
        self._configs[pod] = config
        return pod

    def address(self, pod: str) -> str:
        """Return a sandbox's IP address."""
        status = self.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
        return str(status.network.ip)

    def info(self, pod: str) -> dict[str, Any]:
        """Return a sandbox's verbose information."""
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
        found: dict[str, Any] = json.loads(self.runtime.PodSandboxStatus(request).info["info"])
        return found

    def remove_pod(self, pod: str) -> None:
        """Stop and remove a sandbox, as kubelet does."""
        self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
        self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
        del self._configs[pod]

    @contextlib.contextmanager
    def pod(self, *, privileged: bool = False) -> Iterator[str]:
        """Yield a sandbox that is removed afterwards, unless the body fails: then whoever ends the runtime does it."""
        pod = self.run_pod(privileged=privileged)
        yield pod
        self.remove_pod(pod)

    def create(self, pod: str, name: str, command: list[str], *, privileged: bool = False, **fields: Any) -> str:
        """Create a container; `fields` are those of ContainerConfig."""
        image = fields.pop("image", self.image)
        config = container_config(name, image, command, **fields)
        config.linux.security_context.privileged = privileged
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=self._configs[pod])
        return str(self.runtime.CreateContainer(request).container_id)

    def start(self, container: str) -> None:
        """Start a container."""
        self.runtime.StartContainer(cri.StartContainerRequest(container_id=container))

    def run(self, pod: str, name: str, command: list[str], *, privileged: bool = False, **fields: Any) -> str:
        """Create and start a container."""
        container = self.create(pod, name, command, privileged=privileged, **fields)
        self.start(container)
        return container

    def remove(self, container: str) -> None:
        """Stop a container without grace and remove it."""
        self.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
        self.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))

    def exec(self, container: str, script: str) -> str:
        """Run a shell script in a container and return what it wrote."""
        request = cri.ExecSyncRequest(container_id=container, cmd=["/bin/sh", "-c", script], timeout=120)
        answer = self.runtime.ExecSync(request)
        if answer.exit_code != 0:
            raise RuntimeError(f"{script}: {answer.stderr.decode()}")
        return str(answer.stdout.decode())

    def wait_for_line(self, pod: str, name: str, line: bytes) -> None:
        """Wait until a container's log has some text.

        Raises:
            TimeoutError: It has not after LINE_SECONDS.
        """
        log = Path(self._configs[pod].log_directory) / f"{name}.log"
        end = time.monotonic() + LINE_SECONDS
        while line not in (log.read_bytes() if log.exists() else b""):
            if time.monotonic() > end:
                raise TimeoutError(f"{log} has no {line!r} after {LINE_SECONDS:g} s")
            time.sleep(0.001)
