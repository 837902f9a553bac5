"""Shows vmruntime at work: a real nginx image in a VM, through the CRI socket.

Starts a daemon with directories of its own, imports the demo image, runs it as a pod, fetches its page, asks for its kernel,
and removes everything again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.daemon import Daemon, container_config, running_daemon, sandbox_config  # noqa: E402
from vmruntime.generated import cri_pb2  # noqa: E402

IMAGE = ROOT / "build" / "demo-images" / "nginx.tar"


def main() -> None:
    """Run the demonstration; exit status 0 when nginx answered from another kernel."""
    subprocess.run([str(ROOT / "images" / "demo" / "build.sh"), "nginx"], check=True, stdin=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)  # VMs run unprivileged and pass through
        with running_daemon(Path(directory), built_in_network=True) as daemon:
            show(daemon, Path(directory))


def show(daemon: Daemon, base: Path) -> None:
    """Run the pod and print what it answers."""
    print(f"daemon: pid {daemon.pid}, CRI socket {daemon.socket}")
    reference = f"oci-archive:{IMAGE}:demo.local/nginx:1"
    pulled = daemon.images.PullImage(cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=reference)))
    print(f"image:  {pulled.image_ref}")
    sandbox = sandbox_config("demo", base)
    began = time.monotonic()
    pod = daemon.runtime.RunPodSandbox(cri_pb2.RunPodSandboxRequest(config=sandbox)).pod_sandbox_id
    ready = time.monotonic()
    container = daemon.runtime.CreateContainer(
        cri_pb2.CreateContainerRequest(
            pod_sandbox_id=pod, config=container_config("nginx", pulled.image_ref, []), sandbox_config=sandbox
        )
    ).container_id
    daemon.runtime.StartContainer(cri_pb2.StartContainerRequest(container_id=container))
    started = time.monotonic()
    address = daemon.runtime.PodSandboxStatus(cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod)).status.network.ip
    print(f"pod:    {pod[:13]} at {address}: VM ready in {ready - began:.2f} s, container in {started - ready:.2f} s")
    page = fetch(f"http://{address}/")
    kernel = (
        daemon.runtime.ExecSync(cri_pb2.ExecSyncRequest(container_id=container, cmd=["uname", "-r"], timeout=10))
        .stdout.decode()
        .strip()
    )
    print(f"nginx:  {page.strip().splitlines()[0]}")
    print(f"kernel: {kernel} in the pod, {os.uname().release} on the host")
    if kernel == os.uname().release:
        raise SystemExit("the pod runs on the host's kernel")


def fetch(url: str) -> str:
    """Return a page, trying for 20 s while the server starts."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main()
