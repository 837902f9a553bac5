"""Volumes and devices of container pods, with real guests."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.daemon import Daemon, container_config, sandbox_config
from tests.support.pods import create, out, run_pod, sh, start, status
from tests.support.registry import build_image, files
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

SEEN_WITHIN = 5.0


@pytest.fixture(scope="module")
def pod(daemon: Daemon) -> Iterator[str]:
    """One pod for all tests that leave it as it was."""
    name = run_pod(daemon, "volumes")
    yield name
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory in which mounts can be made and propagate."""
    root = tmp_path / "shared"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(root)], check=True)
    subprocess.run(["mount", "--make-private", str(root)], check=True)
    subprocess.run(["mount", "--make-shared", str(root)], check=True)
    yield root
    subprocess.run(["umount", "-R", "-l", str(root)], check=True)


def run(daemon: Daemon, pod: str, image: str, name: str, *mounts: Any, **fields: Any) -> str:
    return start(daemon, pod, image, name, "sleep 1000", mounts=list(mounts), **fields)


def remove(daemon: Daemon, container: str) -> None:
    daemon.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + SEEN_WITHIN
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def servers(daemon: Daemon, pod: str) -> list[int]:
    """Return the pids of a pod's virtiofsd."""
    found = subprocess.run(
        ["pgrep", "-f", f"source={daemon.run}/shares/{pod[:13]}"], check=True, stdout=subprocess.PIPE
    )
    return [int(pid) for pid in found.stdout.split()]


def mounts_of(daemon: Daemon, pod: str, container: str) -> int:
    """Return how many mounts a container has in its pod's virtiofsd; the host has none."""
    assert container not in Path("/proc/self/mountinfo").read_text()
    return Path(f"/proc/{servers(daemon, pod)[-1]}/mountinfo").read_text().count(container)


def test_directories_and_files_both_ways(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "from-host").write_text("hello")
    (tmp_path / "f").write_text("one file")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    container = run(
        daemon,
        pod,
        image,
        "both",
        cri.Mount(container_path="/data/f", host_path=str(tmp_path / "f")),
        cri.Mount(container_path="/data", host_path=str(tmp_path / "d")),
        cri.Mount(container_path="/ro", host_path=str(tmp_path / "link"), readonly=True),
        cri.Mount(container_path="/new", host_path=str(tmp_path / "not" / "there")),
    )
    assert out(daemon, container, "cat /data/from-host /data/f /ro/from-host") == "helloone filehello"
    out(daemon, container, "echo guest > /data/from-guest; echo more >> /data/f; echo x > /new/x")
    assert (tmp_path / "d" / "from-guest").read_text() == "guest\n"
    assert (tmp_path / "f").read_text() == "one filemore\n"
    assert (tmp_path / "not" / "there" / "x").read_text() == "x\n"
    refused = sh(daemon, container, "echo x > /ro/x")
    assert refused.exit_code != 0
    assert b"Read-only file system" in refused.stderr
    found = status(daemon, container)
    assert [mount.container_path for mount in found.mounts] == ["/data/f", "/data", "/ro", "/new"]
    assert mounts_of(daemon, pod, container) == 4
    remove(daemon, container)
    assert mounts_of(daemon, pod, container) == 0
    assert (tmp_path / "d" / "from-guest").exists()


def test_a_config_map_changes_under_a_running_container(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    def publish(generation: str) -> None:
        data = tmp_path / generation
        data.mkdir()
        (data / "key").write_text(generation)
        (tmp_path / "..data_tmp").symlink_to(generation)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("..1")
    (tmp_path / "key").symlink_to("..data/key")
    container = run(
        daemon, pod, image, "cm", cri.Mount(container_path="/etc/cm", host_path=str(tmp_path), readonly=True)
    )
    assert out(daemon, container, "cat /etc/cm/key") == "..1"
    publish("..2")
    assert until(lambda: out(daemon, container, "cat /etc/cm/key") == "..2")
    remove(daemon, container)


@pytest.mark.parametrize(
    ("propagation", "seen"), [(cri.PROPAGATION_PRIVATE, False), (cri.PROPAGATION_HOST_TO_CONTAINER, True)]
)
def test_a_mount_made_later_on_the_host(
    daemon: Daemon, image: str, pod: str, shared: Path, propagation: int, seen: bool
) -> None:
    (shared / "sub").mkdir()
    mount = cri.Mount(
        container_path="/v", host_path=str(shared), propagation=cri.MountPropagation.ValueType(propagation)
    )
    container = run(daemon, pod, image, f"later-{propagation}", mount)
    assert out(daemon, container, "ls /v/sub") == ""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(shared / "sub")], check=True)
    (shared / "sub" / "file").write_text("x")
    if seen:
        assert until(lambda: out(daemon, container, "ls /v/sub") == "file")
    else:
        time.sleep(1.5)  # longer than the guest believes what it has seen
        assert out(daemon, container, "ls /v/sub") == ""
    remove(daemon, container)
    subprocess.run(["umount", str(shared / "sub")], check=True)


@pytest.mark.parametrize("recursive", [False, True])
def test_mounts_below_a_readonly_one(daemon: Daemon, image: str, pod: str, shared: Path, recursive: bool) -> None:
    (shared / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(shared / "sub")], check=True)
    mount = cri.Mount(container_path="/v", host_path=str(shared), readonly=True, recursive_read_only=recursive)
    container = run(daemon, pod, image, f"rro-{recursive}", mount)
    assert sh(daemon, container, "echo x > /v/x").exit_code != 0
    assert (sh(daemon, container, "echo x > /v/sub/x").exit_code != 0) is recursive
    # Nothing of it is busy on the host because a container has it.
    subprocess.run(["umount", str(shared / "sub")], check=True)
    (shared / "sub").rmdir()
    remove(daemon, container)


def test_memory_is_the_guests_and_the_pods(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    volume = tmp_path / "volumes" / "kubernetes.io~empty-dir" / "cache"
    volume.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=2777,gid=4000", "tmpfs", str(volume)], check=True)
    try:
        mount = cri.Mount(container_path="/cache", host_path=str(volume))
        one = run(daemon, pod, image, "mem1", mount)
        two = run(daemon, pod, image, "mem2", cri.Mount(container_path="/c", host_path=str(volume), readonly=True))
        out(daemon, one, "echo x > /cache/x")
        assert out(daemon, two, "cat /c/x; id; ls -lnd /c").endswith("/c")
        assert sh(daemon, two, "echo y > /c/y").exit_code != 0
        assert list(volume.iterdir()) == []
        assert " 4000 " in out(daemon, one, "ls -lnd /cache")
        full = sh(daemon, one, "head -c 9000000 /dev/zero > /cache/big")
        assert full.exit_code != 0
        assert int(out(daemon, one, "cat /cache/big | wc -c")) < 9000000
        remove(daemon, one)
        remove(daemon, two)
    finally:
        subprocess.run(["umount", str(volume)], check=True)


def test_block_devices_and_device_nodes(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"first words".ljust(1024 * 1024, b"\0"))
    loop = subprocess.run(
        ["losetup", "-f", "--show", str(disk)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        devices = [
            cri.Device(container_path="/dev/block", host_path=loop, permissions="rw"),
            cri.Device(container_path="/dev/nothing", host_path="/dev/null", permissions="rwm"),
        ]
        container = run(daemon, pod, image, "dev", devices=devices)
        assert out(daemon, container, "head -c 11 /dev/block; cat /dev/nothing") == "first words"
        out(daemon, container, "echo changed > /dev/block; sync; echo x > /dev/nothing")
        remove(daemon, container)
        subprocess.run(["blockdev", "--flushbufs", loop], check=True)
        assert disk.read_bytes().startswith(b"changed\n")
        with pytest.raises(grpc.RpcError) as caught:
            create(
                daemon, pod, image, "bad", "true", devices=[cri.Device(container_path="/dev/x", host_path="/dev/no")]
            )
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "/dev/no is not a device of the pod's machine" in str(caught.value.details())
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


def layers_of(pod: str) -> set[str]:
    """Return the layers that a pod's VM has open."""
    argv = ["pgrep", "-f", f"guest=vmruntime-{pod[:13]}"]
    (qemu,) = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
    links = [os.readlink(fd) for fd in Path(f"/proc/{qemu}/fd").iterdir()]
    return {Path(link).stem for link in links if link.endswith(".erofs")}


def test_layers_leave_the_vm_with_the_last_container_that_has_them(daemon: Daemon, image: str, tmp_path: Path) -> None:
    layout = build_image(tmp_path / "data", [files({"word": b"from the volume"})])
    data = str(
        daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=f"oci:{layout}:image"))).image_ref
    )
    pod = run_pod(daemon, "layers")
    other = start(daemon, pod, image, "other", "sleep 1000")
    own = layers_of(pod)
    container = run(
        daemon, pod, image, "reader", cri.Mount(container_path="/i", readonly=True, image=cri.ImageSpec(image=data))
    )
    assert out(daemon, container, "cat /i/word") == "from the volume"
    assert len(layers_of(pod) - own) == 1
    remove(daemon, container)
    assert layers_of(pod) == own
    config = container_config("missing", data, ["/no/such/program"])
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config("layers", daemon.base)
    )
    missing = daemon.runtime.CreateContainer(request).container_id
    assert len(layers_of(pod) - own) == 1
    remove(daemon, missing)
    assert layers_of(pod) == own
    create(daemon, pod, data, "unmade", "true")
    daemon.runtime.StopContainer(cri.StopContainerRequest(container_id=other, timeout=0))
    remove(daemon, other)
    assert len(layers_of(pod)) == 1
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    daemon.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=data)))


def test_an_image_as_a_volume(daemon: Daemon, image: str, pod: str) -> None:
    volume = cri.Mount(container_path="/image", readonly=True, image=cri.ImageSpec(image=image))
    part = cri.Mount(container_path="/part", readonly=True, image=cri.ImageSpec(image=image), image_sub_path="etc")
    container = run(daemon, pod, image, "image", volume, part)
    assert "web" in out(daemon, container, "cat /image/etc/passwd /part/group")
    assert [mount.image.image_ref for mount in status(daemon, container).mounts] == [image, image]
    assert sh(daemon, container, "echo x > /image/x").exit_code != 0
    remove(daemon, container)


def test_what_a_vm_cannot_have_is_refused(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    mount = cri.Mount(
        container_path="/v", host_path=str(tmp_path), propagation=cri.MountPropagation.PROPAGATION_BIDIRECTIONAL
    )
    with pytest.raises(grpc.RpcError) as caught:
        create(daemon, pod, image, "bi", "true", mounts=[mount])
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "vmruntime.io/kind: host" in str(caught.value.details())
    with pytest.raises(grpc.RpcError) as caught:
        create(
            daemon,
            pod,
            image,
            "none",
            "true",
            mounts=[cri.Mount(container_path="/i", readonly=True, image=cri.ImageSpec(image="no/where:1"))],
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_guest_changes_nothing_but_its_volumes(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    """virtiofsd, through which alone the guest has the share, has it read-only, except for the volumes."""
    container = run(daemon, pod, image, "sealed", cri.Mount(container_path="/v", host_path=str(tmp_path)))
    lines = Path(f"/proc/{servers(daemon, pod)[-1]}/mountinfo").read_text().splitlines()
    options = {fields[4]: fields[5].split(",") for fields in map(str.split, lines)}
    assert "ro" in options["/"]
    assert "rw" in options[f"/{container}/0"]
    remove(daemon, container)


def test_volumes_outlive_the_daemon_and_end_with_virtiofsd(daemon: Daemon, image: str, tmp_path: Path) -> None:
    pod = run_pod(daemon, "restart")
    mount = cri.Mount(container_path="/v", host_path=str(tmp_path))
    first = run(daemon, pod, image, "first", mount)
    daemon.stop(signal.SIGKILL)
    daemon.start()
    out(daemon, first, "echo 1 > /v/1")
    second = run(daemon, pod, image, "second", mount)
    assert out(daemon, second, "cat /v/1") == "1"
    for pid in servers(daemon, pod):
        os.kill(pid, signal.SIGKILL)
    assert until(lambda: bool(status(daemon, first).state == cri.CONTAINER_EXITED))
    assert "virtiofsd" in status(daemon, first).message
    daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert (tmp_path / "1").exists()


def test_mount_options(daemon: Daemon, image: str, pod: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "script").chmod(0o755)
    both = [
        cri.Mount(container_path=path, host_path=str(tmp_path), mount_options=options)
        for path, options in (("/v", []), ("/n", ["noexec", "nosuid", "nodev"]))
    ]
    container = run(daemon, pod, image, "options", *both)
    assert out(daemon, container, "/v/script") == "ran"
    assert b"Permission denied" in sh(daemon, container, "/n/script").stderr
    assert daemon.runtime.Status(cri.StatusRequest()).features.mount_options
    wrong = cri.Mount(container_path="/w", host_path=str(tmp_path), mount_options=["size=1"])
    with pytest.raises(grpc.RpcError) as caught:
        create(daemon, pod, image, "wrong", "true", mounts=[wrong])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "config.mounts[0].mount_options[0]: 'size=1'" in str(caught.value.details())
