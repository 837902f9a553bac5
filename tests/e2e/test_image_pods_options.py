"""What image pods can be asked for, seen from inside of their guests.

Booting takes most of the time, so that a machine has many of the options at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from tests.support import leaks, vm_images
from tests.support import registry as reg
from tests.support.daemon import Daemon
from tests.support.image_pods import (
    Machine,
    boot,
    create,
    image_daemon,
    pull,
    run_pod,
    ssh,
    ssh_key,
    up_and_down,
    wait_until,
)
from tests.support.screen import vmruntime
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

SMALL = "virtlet.cloud/small"
CONTAINER_DISK = "registry.example/vms/small:1"
SYSTEM_UUID = "53008994-44c0-4017-ad44-9c49758083da"
MIB = 1 << 20
GUEST_SETTINGS = "[guest]\nimage_memory_mib = 256\n"
DATA_BYTES = 8 * MIB
SCRATCH_BYTES = 16 * MIB
VOLUME_BYTES = 600 * MIB
"""More than the small image has."""


@pytest.fixture(scope="module")
def place(base: Path) -> Path:
    """A directory of this module's own, which VMs may pass through."""
    found = base / "options"
    found.mkdir()
    return found


@pytest.fixture(scope="module")
def registry(place: Path) -> Iterator[reg.Registry]:
    """A registry with the small image's containerDisk."""
    with reg.registry(place / "registry") as server:
        server.copy(f"oci-archive:{vm_images.containerdisk('small')}", "vms/small:1")
        yield server


@pytest.fixture(scope="module")
def vms(place: Path, registry: reg.Registry) -> Iterator[Daemon]:
    """A daemon that knows the small image by its file, and the registry."""
    conf = reg.registries_conf(place / "registries.conf", {"registry.example": registry.address})
    extra = f'registries_conf = "{conf}"\n{GUEST_SETTINGS}'
    with image_daemon(place / "vms", {"small": vm_images.small().as_uri()}, extra) as daemon:
        pull(daemon, SMALL)
        yield daemon


@pytest.fixture(scope="module")
def kubelet(place: Path) -> Iterator[Path]:
    """Volumes as kubelet has them: ConfigMaps, a Secret, and an emptyDir in memory."""
    root = place / "kubelet" / "pods" / "uid" / "volumes"
    _, public = ssh_key(place)
    for kind, name, content in (
        ("secret", "log-in", {"authorized_keys": public}),
        (
            "configmap",
            "set-up",
            {"write_files": "- {path: /etc/from-source, content: of the source}\n", "runcmd": "- touch /root/ran\n"},
        ),
        ("configmap", "files", {"app": "level: 7\n", "app_path": "/etc/app.conf", "app_encoding": "plain"}),
    ):
        volume = root / f"kubernetes.io~{kind}" / name
        (volume / "..2026_1").mkdir(parents=True)
        (volume / "..data").symlink_to("..2026_1")
        for key, text in content.items():
            (volume / "..2026_1" / key).write_text(text)
            (volume / key).symlink_to(f"..data/{key}")
    memory = root / "kubernetes.io~empty-dir" / "memory"
    memory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SCRATCH_BYTES}", "tmpfs", str(memory)], check=True)
    yield root
    subprocess.run(["umount", str(memory)], check=True)


@contextlib.contextmanager
def loop_device(file: Path, size: int) -> Iterator[str]:
    """Yield a block device of a size."""
    with file.open("ab") as sparse:
        sparse.truncate(size)
    argv = ["losetup", "--find", "--show", str(file)]
    device = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def content_of(device: str) -> str:
    """Return a hash of what a block device has."""
    subprocess.run(["blockdev", "--flushbufs", device], check=True)
    with open(device, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_on(device: str) -> str:
    """Return the digest of the image that a persistent root was made from, which its last MiB has."""
    with open(device, "rb") as file:
        file.seek(VOLUME_BYTES - MIB + 24)
        text: str = json.loads(file.read(512).rstrip(b"\0"))["image"]
    return text


def block_volume(device: str, path: str) -> cri.Device:
    """Return a volume of volumeMode Block as kubelet hands it to a container."""
    return cri.Device(container_path=path, host_path=device, permissions="rw")


def kubelet_volume(kubelet: Path, kind: str, name: str) -> cri.Mount:
    """Return a mount of one of kubelet's volumes, at /vol/NAME."""
    path = kubelet / f"kubernetes.io~{kind}" / name
    return cri.Mount(container_path=f"/vol/{name}", host_path=str(path), readonly=kind != "empty-dir")


@pytest.fixture(scope="module")
def data(place: Path) -> Iterator[str]:
    """A block volume."""
    with loop_device(place / "data.raw", DATA_BYTES) as device:
        yield device


@pytest.fixture(scope="module")
def optioned(vms: Daemon, data: str, kubelet: Path) -> Machine:
    """A machine with everything that is not as usual."""
    machine = boot(
        vms,
        "optioned",
        SMALL,
        {
            "vmruntime.io/firmware": "uefi",
            "VirtletDiskDriver": "virtio",
            "VirtletCloudInitImageType": "configdrive",
            "VirtletSystemUUID": SYSTEM_UUID,
            "vmruntime.io/vcpus": "2",
            "vmruntime.io/vnc": "true",
            "vmruntime.io/tpm": "true",
            "VirtletRootVolumeSize": "1Gi",
        },
        devices=[block_volume(data, "/dev/data")],
        mounts=[kubelet_volume(kubelet, "empty-dir", "memory")],
    )
    machine.wait_agent()
    return machine


@pytest.fixture(scope="module")
def sourced(vms: Daemon, kubelet: Path) -> Machine:
    """A machine that is told by ConfigMaps and Secrets who it is, and by DHCP where."""
    machine = boot(
        vms,
        "sourced",
        SMALL,
        {
            "VirtletForceDHCPNetworkConfig": "true",
            "VirtletSSHKeySource": "secret/log-in",
            "vmruntime.io/cloud-init-user-data-source": "configmap/set-up",
            "vmruntime.io/files-from-data-source": "configmap/files",
        },
        pod_fields={"dns_config": cri.DNSConfig(servers=["192.0.2.53"], searches=["vms.example"])},
        mounts=[
            kubelet_volume(kubelet, "secret", "log-in"),
            kubelet_volume(kubelet, "configmap", "set-up"),
            kubelet_volume(kubelet, "configmap", "files"),
        ],
    )
    machine.wait_agent()
    return machine


@pytest.fixture(autouse=True)
def clean(vms: Daemon, optioned: Machine, sourced: Machine) -> Iterator[None]:
    """The leak check, of a daemon that has run machines already: what it then keeps open for all of them is no leak."""
    pods, containers = vms.pods(), vms.containers()
    with leaks.nothing_left(vms.footprint, lambda: vms.remove_all_but(pods, containers), kept=pods):
        yield


def test_the_machine_is_as_the_annotations_say(optioned: Machine) -> None:
    assert optioned.out("test -d /sys/firmware/efi && echo uefi") == "uefi"
    assert optioned.out("cat /sys/class/dmi/id/product_uuid").lower() == SYSTEM_UUID
    assert optioned.out("nproc") == "2"
    assert optioned.out("ls /sys/firmware/acpi/tables | grep TPM") == "TPM2"
    disks = optioned.out("ls /sys/block").split()
    assert {"vda", "vdb"} <= set(disks)
    assert not [name for name in disks if name.startswith("sd")]
    assert optioned.out("cat /sys/block/$(basename $(readlink /dev/disk/by-id/virtio-root))/size") == str(2 * MIB)
    assert optioned.out("hostname") == "optioned"
    assert "meta_data.json" in optioned.out("ls /run/seed/openstack/latest")
    assert optioned.ip in optioned.out("ip -4 addr show")


def test_a_block_volume_is_where_the_container_has_it(optioned: Machine, data: str) -> None:
    assert optioned.out("blockdev --getsize64 /dev/data") == str(DATA_BYTES)
    optioned.out("printf 'from the guest' | dd of=/dev/data bs=1M seek=1 conv=fsync 2>/dev/null; sync")
    subprocess.run(["blockdev", "--flushbufs", data], check=True)
    with open(data, "rb") as device:
        device.seek(MIB)
        assert device.read(14) == b"from the guest"


def test_memory_of_an_empty_dir_is_the_guests(optioned: Machine, kubelet: Path) -> None:
    kind, options = optioned.out("awk '$2 == \"/vol/memory\" {print $3, $4}' /proc/mounts").split()
    assert kind == "tmpfs"
    assert f"size={SCRATCH_BYTES // 1024}k" in options.split(",")
    optioned.out("echo x >/vol/memory/file")
    assert list((kubelet / "kubernetes.io~empty-dir" / "memory").iterdir()) == []


def test_the_screen_is_served(optioned: Machine) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as viewer:
        viewer.settimeout(20)
        viewer.connect(str(optioned.directory / "vnc.sock"))
        assert viewer.recv(12).startswith(b"RFB 003.")


def test_dhcp_alone_sets_up_the_network(sourced: Machine) -> None:
    assert sourced.out("ls /run/seed").split() == ["meta-data", "user-data"]
    assert sourced.ip in sourced.out("ip -4 addr show dev eth0")
    gateway = sourced.ip.rpartition(".")[0] + ".1"
    assert f"default via {gateway} dev eth0" in sourced.out("ip -4 route")
    assert sourced.out("cat /etc/resolv.conf").split("\n") == ["nameserver 192.0.2.53", "search vms.example"]
    sourced.out(f"ping -c 1 -W 5 {gateway}")


def test_configmaps_and_secrets_say_what_cloud_init_does(sourced: Machine, place: Path) -> None:
    assert sourced.out("cat /etc/from-source") == "of the source"
    assert sourced.out("cat /etc/app.conf; stat -c %a /etc/app.conf") == "level: 7\n644"
    sourced.out("test -e /root/ran")
    assert ssh(place / "id_ed25519", sourced.ip, "cat /vol/files/app").strip() == "level: 7"


@pytest.mark.parametrize(
    ("annotation", "source"),
    [
        ("ssh-key-source", "secret/log-in"),
        ("cloud-init-user-data-source", "configmap/set-up"),
        ("files-from-data-source", "configmap/files"),
    ],
)
def test_a_source_that_is_not_mounted_is_refused(vms: Daemon, kubelet: Path, annotation: str, source: str) -> None:
    pod = run_pod(vms, "unmounted", {f"vmruntime.io/{annotation}": source})
    kind, name = source.split("/")
    other = {"secret": "configmap", "configmap": "secret"}[kind]
    stranger = kubelet / f"kubernetes.io~{other}" / name  # the same name, and not the same object
    stranger.mkdir(parents=True, exist_ok=True)
    with pytest.raises(grpc.RpcError) as refused:
        create(vms, pod, "unmounted", SMALL, mounts=[kubelet_volume(kubelet, other, name)])
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert f"annotation {annotation}: {source} is not among the container's volumes" in str(refused.value.details())


def test_a_machine_grows_while_it_runs(sourced: Machine) -> None:
    def memory_kib() -> int:
        return int(sourced.out("awk '/MemTotal/ {print $2}' /proc/meminfo"))

    before = memory_kib()
    assert (before < 256 << 10, sourced.out("nproc")) == (True, "1")
    resources = cri.LinuxContainerResources(memory_limit_in_bytes=512 * MIB, cpu_quota=200_000, cpu_period=100_000)
    sourced.daemon.runtime.UpdateContainerResources(
        cri.UpdateContainerResourcesRequest(container_id=sourced.container, linux=resources)
    )
    wait_until(lambda: memory_kib() >= before + (200 << 10), lambda: f"{before} KiB became {memory_kib()}", 60)
    wait_until(lambda: sourced.out("nproc") == "2", lambda: sourced.out("cat /sys/devices/system/cpu/online"), 60)


def test_the_buttons_of_a_machine(sourced: Machine) -> None:
    def press(button: str) -> None:
        done = vmruntime(sourced.daemon, button, "sourced")
        assert done.returncode == 0, done.stderr.decode()

    first = sourced.out("cat /proc/sys/kernel/random/boot_id")
    sourced.out("(while sleep 0.2; do echo tick >/dev/ttyS0; done) >/dev/null 2>&1 </dev/null &")
    console = sourced.directory / "console.log"
    sourced.wait_for_log("tick")
    press("pause")
    size = console.stat().st_size
    time.sleep(2)
    assert console.stat().st_size == size
    press("resume")
    wait_until(lambda: console.stat().st_size > size, lambda: "nothing is said any more", 30)
    assert sourced.out("cat /proc/sys/kernel/random/boot_id") == first
    press("reset")
    sourced.wait_for_log("small: up after", times=2)
    sourced.wait_agent()
    assert sourced.out("cat /proc/sys/kernel/random/boot_id") != first
    assert sourced.status().state == cri.CONTAINER_RUNNING


def test_a_guest_that_heeds_no_button_is_ended_when_its_time_is_up(sourced: Machine) -> None:
    """The last one of that machine."""
    sourced.out("echo '#!/bin/sh' >/etc/acpi/PWRF/00000080; echo '#!/bin/sh' >/usr/sbin/shutdown")
    began = time.monotonic()
    sourced.stop(8)
    assert 8 <= time.monotonic() - began < 40
    ended = sourced.status()
    assert (ended.exit_code, ended.reason) == (137, "Error")
    assert "did not shut down in time" in ended.message
    request = cri.RemoveContainerRequest(container_id=sourced.container)
    sourced.daemon.runtime.RemoveContainer(request)


def test_a_persistent_root_outlives_its_pod(vms: Daemon, place: Path) -> None:
    pull(vms, CONTAINER_DISK)
    with loop_device(place / "root.raw", VOLUME_BYTES) as device:
        volumes: list[cri.Device] = [block_volume(device, "/")]
        first = boot(vms, "rooted", CONTAINER_DISK, devices=volumes)
        first.wait_agent()
        assert first.out("cat /sys/block/sda/size") == str((VOLUME_BYTES - MIB) // 512)
        first.out("echo kept >/root/note && sync")
        first.stop(60)
        assert first.status().exit_code == 0
        vms.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=first.pod))

        before = content_of(device)
        with pytest.raises(grpc.RpcError) as refused:
            create(vms, run_pod(vms, "other"), "other", SMALL, devices=volumes)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        text = str(refused.value.details())
        assert f"not from sha256:{hashlib.sha256(vm_images.small().read_bytes()).hexdigest()}" in text
        assert f"made from the image {image_on(device)}, " in text
        assert content_of(device) == before

        second = boot(vms, "rooted-again", CONTAINER_DISK, devices=volumes)
        second.wait_agent()
        assert second.out("cat /root/note") == "kept"
        second.stop(0)
        vms.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=second.pod))


def test_a_volume_with_somebodys_data_is_no_root(vms: Daemon, place: Path) -> None:
    with loop_device(place / "theirs.raw", VOLUME_BYTES) as device:
        subprocess.run(["mkfs.ext4", "-q", "-L", "theirs", device], check=True)
        before = content_of(device)
        pod = run_pod(vms, "theirs")
        with pytest.raises(grpc.RpcError) as refused:
            create(vms, pod, "theirs", SMALL, devices=[block_volume(device, "/")])
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"{device}: is not blank" in str(refused.value.details())
        assert content_of(device) == before


@contextlib.contextmanager
def web_server(directory: Path) -> Iterator[str]:
    """Serve a directory by HTTP; yield its URL."""
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def translate(place: Path, rules: Mapping[str, Mapping[str, str]]) -> None:
    """Tell the daemon more names: to URL and checksum."""
    translations = [{"name": name, **rule} for name, rule in rules.items()]
    (place / "vms" / "images.d" / "web.json").write_text(json.dumps({"translations": translations}))


def test_images_by_http_are_what_their_checksums_say_and_nothing_hostile(vms: Daemon, place: Path) -> None:
    www = place / "www"
    www.mkdir()
    shutil.copy(vm_images.small(), www / "small.qcow2")
    create_disk = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create_disk, "-b", "/etc/shadow", "-F", "raw", str(www / "backed.qcow2"), "1G"], check=True)
    subprocess.run([*create_disk, str(www / "blank.qcow2"), "1G"], check=True)
    digest = hashlib.sha256((www / "small.qcow2").read_bytes()).hexdigest()
    with web_server(www) as url:
        translate(
            place,
            {
                "right": {"url": f"{url}/small.qcow2", "checksum": f"sha256:{digest}"},
                "wrong": {"url": f"{url}/blank.qcow2", "checksum": f"sha256:{digest[::-1]}"},
                "hostile": {"url": f"{url}/backed.qcow2"},
            },
        )
        for name, words in (("wrong", digest[::-1]), ("hostile", "has a backing file")):
            with pytest.raises(grpc.RpcError) as refused:
                pull(vms, f"virtlet.cloud/{name}")
            assert words in str(refused.value.details())
            status = vms.images.ImageStatus(
                cri.ImageStatusRequest(image=cri.ImageSpec(image=f"virtlet.cloud/{name}:latest"))
            )
            assert not status.HasField("image")
        assert pull(vms, "virtlet.cloud/right").removeprefix("sha256:") == digest
    up_and_down(vms, "by-http", "virtlet.cloud/right")
