"""Real server programs from Debian, pulled from a real registry by their names and used over the network."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support import leaks, registry
from tests.support.daemon import Daemon, container_config, running_daemon, sandbox_config
from tests.support.pods import run_pod, status, wait_exit
from tests.support.registry import Registry
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("nginx", "redis", "python", "busybox")


@dataclasses.dataclass
class Site:
    """A node with its registries: a mirror of docker.io, and a private one."""

    daemon: Daemon
    mirror: Registry
    private: Registry

    def pull(self, name: str, auth: Any = None) -> str:
        request = cri.PullImageRequest(image=cri.ImageSpec(image=name), auth=auth)
        return str(self.daemon.images.PullImage(request, timeout=120).image_ref)

    def image(self, name: str) -> Any:
        return self.daemon.images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=name))).image

    def layers(self) -> dict[str, tuple[int, int]]:
        """Layer files with inode and time of writing: what is made again has others."""
        files = (self.daemon.root / "layers").iterdir()
        return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}

    def start(self, pod: str, image: str, name: str, *argv: str, **fields: Any) -> str:
        """Start a container of an image with its own command, or with arguments in its place."""
        found = self.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
        sandbox = sandbox_config(found.metadata.name, self.daemon.base)
        request = cri.CreateContainerRequest(
            pod_sandbox_id=pod, config=container_config(name, image, list(argv), **fields), sandbox_config=sandbox
        )
        container = str(self.daemon.runtime.CreateContainer(request).container_id)
        self.daemon.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
        return container

    def ip(self, pod: str) -> str:
        found = self.daemon.runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
        return str(found.network.ip)

    def execute(self, container: str, *argv: str) -> Any:
        return self.daemon.runtime.ExecSync(cri.ExecSyncRequest(container_id=container, cmd=argv, timeout=20))

    def log(self, container: str) -> list[tuple[str, str]]:
        """Return (stream, text) of every line of a container's log."""
        lines = Path(status(self.daemon, container).log_path).read_text().splitlines()
        return [(line.split(" ", 3)[1], line.split(" ", 3)[3]) for line in lines]


@pytest.fixture(scope="module")
def site(base: Path) -> Iterator[Site]:
    """A mirror that has the four images, a private registry that has one, and a daemon that knows of both."""
    subprocess.run([str(ROOT / "images" / "demo" / "build.sh"), *NAMES], check=True, stdin=subprocess.DEVNULL)
    with contextlib.ExitStack() as stack:
        mirror = stack.enter_context(registry.registry(base / "mirror"))
        private = stack.enter_context(registry.registry(base / "private", auth=True))
        for name in NAMES:
            archive = f"oci-archive:{ROOT}/build/demo-images/{name}.tar"
            mirror.copy(archive, f"library/{name}:1")
        private.copy(f"oci-archive:{ROOT}/build/demo-images/busybox.tar", "team/tool:1")
        conf = registry.mirror_conf(base / "registries.conf", "docker.io", mirror.address, private.address)
        extra = f'[images]\nregistries_conf = "{conf}"'
        daemon = stack.enter_context(running_daemon(base / "real", extra))
        yield Site(daemon, mirror, private)


@pytest.fixture(autouse=True)
def clean(site: Site) -> Iterator[None]:
    pods = site.daemon.pods()
    with leaks.nothing_left(site.daemon.footprint, lambda: site.daemon.remove_all_but(pods), kept=pods):
        yield


@pytest.fixture(scope="module")
def images(site: Site) -> dict[str, str]:
    """The four images by name, pulled."""
    return {name: site.pull(f"{name}:1") for name in NAMES}


@pytest.fixture(scope="module")
def pod(site: Site) -> Iterator[str]:
    """A pod for every test here that needs no other."""
    yield (name := run_pod(site.daemon, "real"))
    site.daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


def fetch(url: str) -> tuple[int, str, str]:
    """Return status, server and body of a page, trying for 20 s while the server starts."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status, answer.headers["Server"], answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Server"], error.read().decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_a_base_layer_is_fetched_and_stored_once(site: Site) -> None:
    nginx = site.pull("docker.io/library/nginx:1")
    first = site.layers()
    assert len(first) == 2
    fetched = site.mirror.blob_downloads()
    redis = site.pull("redis:1")  # a short name means docker.io/library
    second = site.layers()
    assert len(second) == 3
    assert {name: second[name] for name in first} == first
    again = site.mirror.blob_downloads()[len(fetched) :]
    manifest = site.mirror.manifest("library/redis:1")
    base, top = [layer["digest"] for layer in manifest["layers"]]
    assert base in fetched
    assert base not in again
    assert top in again

    assert site.image("nginx:1").id == nginx
    assert list(site.image(redis).repo_tags) == ["docker.io/library/redis:1"]
    assert site.image("redis:1").repo_digests[0].startswith("docker.io/library/redis@sha256:")
    usage = site.daemon.images.ImageFsInfo(cri.ImageFsInfoRequest()).image_filesystems[0].used_bytes.value
    both = site.image(nginx).size + site.image(redis).size
    base_bytes = both - usage
    assert base_bytes > usage / 2  # the base is most of it, and counted once

    site.daemon.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=nginx)))
    assert len(site.layers()) == 2  # redis keeps the base
    site.pull("nginx:1")
    assert base not in site.mirror.blob_downloads()[len(fetched) + len(again) :]


def test_nginx_answers_the_host(site: Site, pod: str, images: dict[str, str]) -> None:
    container = site.start(pod, images["nginx"], "web")
    code, server, page = fetch(f"http://{site.ip(pod)}/")
    assert (code, server.split("/")[0]) == (200, "nginx")
    assert "<html" in page
    assert fetch(f"http://{site.ip(pod)}/absent")[0] == 404
    site.daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=20))
    ended = wait_exit(site.daemon, container)
    assert (ended.exit_code, ended.reason) == (0, "Completed")  # SIGQUIT, from the image, ends nginx in good order
    requests = [text for stream, text in site.log(container) if stream == "stdout"]
    assert len(requests) == 2
    assert '"GET / HTTP/1.1" 200' in requests[0]
    assert '"GET /absent HTTP/1.1" 404' in requests[1]


def test_redis_serves_another_pod(site: Site, pod: str, images: dict[str, str]) -> None:
    server = site.start(pod, images["redis"], "redis")
    other = run_pod(site.daemon, "client")
    client = site.start(other, images["redis"], "cli", "sleep", "1000")
    cli = ("redis-cli", "-h", site.ip(pod))
    deadline = time.monotonic() + 20
    while b"PONG" not in site.execute(client, *cli, "PING").stdout:
        assert time.monotonic() < deadline, site.log(server)
        time.sleep(0.2)
    assert site.execute(client, *cli, "SET", "greeting", "from pod to pod").stdout == b"OK\n"
    assert site.execute(client, *cli, "GET", "greeting").stdout == b"from pod to pod\n"
    assert site.execute(client, *cli, "INCRBY", "n", "41").stdout == b"41\n"
    assert site.execute(server, "id", "-un").stdout == b"redis\n"  # the image's user
    assert site.ip(other) != site.ip(pod)


PROGRAM = """
import os, sys
print("π is", 355 / 113, "in", os.uname().nodename)
sys.stderr.write("a warning\\n")
print("x" * 20000)
sys.exit(3)
"""


def test_a_python_program_writes_its_log(site: Site, pod: str, images: dict[str, str]) -> None:
    container = site.start(pod, images["python"], "script", "python3", "-Xutf8", "-c", PROGRAM)
    ended = wait_exit(site.daemon, container)
    assert (ended.exit_code, ended.reason) == (3, "Error")
    log = site.log(container)
    out = [text for stream, text in log if stream == "stdout"]
    assert out[0] == f"π is {355 / 113} in real"
    assert "".join(out[1:]) == "x" * 20000  # one line, cut into partial ones of 16 KiB
    assert [text for stream, text in log if stream == "stderr"] == ["a warning"]


@pytest.mark.parametrize(
    ("name", "program", "code"),
    [("killed", "os.kill(os.getpid(), 9)", 137), ("crashed", "os.abort()", 134), ("unhandled", "1 / 0", 1)],
)
def test_ends_have_the_codes_a_shell_gives(
    site: Site, pod: str, images: dict[str, str], name: str, program: str, code: int
) -> None:
    container = site.start(pod, images["python"], name, "sh", "-c", f"python3 -c 'import os; {program}'; exit $?")
    ended = wait_exit(site.daemon, container)
    assert (ended.exit_code, ended.reason) == (code, "Error")


def test_too_much_memory_is_reported_as_such(site: Site, pod: str, images: dict[str, str]) -> None:
    limits = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(memory_limit_in_bytes=32 << 20))
    container = site.start(
        pod, images["python"], "hog", "python3", "-c", "print('before', flush=True); bytearray(1 << 28)", linux=limits
    )
    ended = wait_exit(site.daemon, container)
    assert (ended.exit_code, ended.reason) == (137, "OOMKilled")
    assert site.log(container) == [("stdout", "before")]
    assert site.execute(site.start(pod, images["busybox"], "after", "sleep", "1000"), "true").exit_code == 0


def test_busybox_has_its_applets(site: Site, pod: str, images: dict[str, str]) -> None:
    container = site.start(pod, images["busybox"], "box", "sh", "-c", "awk 'BEGIN { print 6 * 7 }' | tr 4 5; exit 9")
    assert wait_exit(site.daemon, container).exit_code == 9
    assert site.log(container) == [("stdout", "52")]


def test_private_images_need_credentials_every_time(site: Site) -> None:
    name = f"{site.private.address}/team/tool:1"
    wrong = cri.AuthConfig(username=registry.USER, password="wrong-and-secret")
    right = cri.AuthConfig(username=registry.USER, password=registry.PASSWORD)
    encoded = base64.b64encode(f"{registry.USER}:{registry.PASSWORD}".encode()).decode()
    for auth in (None, wrong):
        with pytest.raises(grpc.RpcError) as refused:
            site.pull(name, auth)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert name in str(refused.value.details())
        assert "pull secret" in str(refused.value.details())
        assert "wrong-and-secret" not in str(refused.value.details())
    image = site.pull(name, right)
    assert name in site.image(image).repo_tags
    assert site.pull(name, cri.AuthConfig(auth=encoded)) == image
    with pytest.raises(grpc.RpcError) as refused:
        site.pull(name)  # what one request brought is not lent to the next
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED

    written = [site.daemon.log, *(file for file in site.daemon.root.glob("vmruntime.db*")), *site.daemon.run.rglob("*")]
    for file in written:
        content = file.read_bytes() if file.is_file() else b""
        for secret in (registry.PASSWORD, encoded, "wrong-and-secret"):
            assert secret.encode() not in content, file
