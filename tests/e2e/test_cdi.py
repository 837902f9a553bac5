"""CDI devices: everything of them in host pods; block devices, mounts and variables in VMs, and the rest refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.daemon import Daemon, container_config, running_daemon, sandbox_config
from tests.support.pods import out, sh
from tests.support.refusal import refused
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

DISK_BYTES = 1 << 20


class Vendor:
    """A vendor of devices: two directories of CDI files, a disk, a library, a hook that writes down that it ran."""

    def __init__(self, base: Path) -> None:
        self.etc, self.run = base / "etc", base / "run"
        for directory in (base, self.etc, self.run):
            directory.mkdir()
        self.library = base / "libvendor.so"
        self.library.write_text("library\n")
        self.marks, self.hook = base / "marks", base / "hook.sh"
        self.hook.write_text(f"#!/bin/sh\necho $1 $GREETING >> {self.marks}\n")
        self.hook.chmod(0o755)
        image = base / "disk.img"
        image.write_bytes(b"vendor-disk" + bytes(DISK_BYTES - 11))
        attach = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
        self.disk = attach.stdout.strip()

    def write(self) -> None:
        mount = {"hostPath": str(self.library), "containerPath": "/usr/lib/libvendor.so", "options": ["ro", "nosuid"]}
        disk = {"path": "/dev/vendor-disk", "hostPath": self.disk, "permissions": "rw", "fileMode": 0o600}
        null = {"path": "/dev/vendor-null", "hostPath": "/dev/null"}
        random = {
            "path": "/dev/vendor-random",
            "type": "c",
            "major": 1,
            "minor": 9,
            "fileMode": 0o640,
            "uid": 7,
            "gid": 8,
        }
        hook = {"hookName": "createRuntime", "path": str(self.hook), "args": ["hook", "x"], "env": ["GREETING=hello"]}
        lost = {"hostPath": "/nowhere/to/be/found", "containerPath": "/lost"}
        devices = {
            "disk": {"env": ["DISK=/dev/vendor-disk"], "deviceNodes": [disk], "additionalGIDs": [4242]},
            "null": {"deviceNodes": [null, random]},
            "hooked": {"hooks": [hook]},
            "lost": {"mounts": [lost]},
            "both": {"env": ["FROM=etc"]},
        }
        document = {
            "cdiVersion": "0.7.0",
            "kind": "vendor.com/thing",
            "containerEdits": {"env": ["VENDOR=yes"], "mounts": [mount]},
            "devices": [{"name": name, "containerEdits": edits} for name, edits in devices.items()],
        }
        (self.etc / "vendor.json").write_text(json.dumps(document))
        (self.run / "vendor.yaml").write_text(
            "cdiVersion: 0.5.0\nkind: vendor.com/thing\ndevices:\n- name: both\n  containerEdits:\n    env: [FROM=run]\n"
        )


@pytest.fixture(scope="module")
def vendor(base: Path) -> Iterator[Vendor]:
    made = Vendor(base / "vendor")
    made.write()
    yield made
    subprocess.run(["losetup", "-d", made.disk], check=True)


@pytest.fixture(scope="module")
def node(base: Path, vendor: Vendor) -> Iterator[Daemon]:
    with running_daemon(base / "c", f'cdi_spec_dirs = ["{vendor.etc}", "{base}/none", "{vendor.run}"]') as daemon:
        yield daemon


@pytest.fixture(scope="module")
def app(node: Daemon, busybox: str) -> str:
    return str(node.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox))).image_ref)


@pytest.fixture(scope="module", params=["container", "host"])
def pod(request: pytest.FixtureRequest, node: Daemon) -> Iterator[tuple[str, str]]:
    """A pod of each kind: (kind, id)."""
    config = sandbox_config(request.param, node.base, annotations={"vmruntime.io/kind": request.param})
    name = str(node.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id)
    yield str(request.param), name
    node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=name))


def create(node: Daemon, pod: tuple[str, str], app: str, name: str, *devices: str, **security: Any) -> str:
    options = cri.NamespaceOption(pid=cri.CONTAINER)
    linux = cri.LinuxContainerConfig(
        security_context=cri.LinuxContainerSecurityContext(namespace_options=options, **security)
    )
    names = [cri.CDIDevice(name=f"vendor.com/thing={device}") for device in devices]
    config = container_config(
        name, app, ["/bin/sleep", "1000"], envs=[cri.KeyValue(key="FROM", value=b"cri")], CDI_devices=names, linux=linux
    )
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod[1], config=config, sandbox_config=sandbox_config(pod[0], node.base)
    )
    return str(node.runtime.CreateContainer(request).container_id)


def start(node: Daemon, pod: tuple[str, str], app: str, name: str, *devices: str, **security: Any) -> str:
    container = create(node, pod, app, name, *devices, **security)
    node.runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    return container


def remove(node: Daemon, container: str) -> None:
    node.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container))


def test_a_disk_with_what_belongs_to_it(node: Daemon, app: str, pod: tuple[str, str], vendor: Vendor) -> None:
    container = start(node, pod, app, "disk", "disk", "both", run_as_username="web")
    assert out(node, container, "echo $VENDOR $DISK $FROM") == "yes /dev/vendor-disk run"
    assert out(node, container, "id -G") == "1002 4242"
    assert out(node, container, "stat -c '%u %g %a' /dev/vendor-disk") == "1001 1002 600"
    assert out(node, container, "head -c 11 /dev/vendor-disk; cat /usr/lib/libvendor.so") == "vendor-disklibrary"
    assert sh(node, container, "echo x > /usr/lib/libvendor.so").exit_code != 0
    out(node, container, "echo written | busybox dd of=/dev/vendor-disk bs=512 seek=4 conv=notrunc,fsync")
    with open(vendor.disk, "rb") as disk:
        disk.seek(2048)
        assert disk.read(7) == b"written"
    # A second container of the pod has it as well; it goes with the last of them, and comes back.
    second = start(node, pod, app, "second", "disk")
    remove(node, container)
    assert out(node, second, "head -c 11 /dev/vendor-disk") == "vendor-disk"
    remove(node, second)
    third = start(node, pod, app, "third", "disk")
    assert out(node, third, "head -c 11 /dev/vendor-disk") == "vendor-disk"


def test_character_devices_and_hooks_are_the_hosts(
    node: Daemon, app: str, pod: tuple[str, str], vendor: Vendor
) -> None:
    if pod[0] == "container":
        words = (
            "vendor.com/thing=null",
            "character device '/dev/null'",
            "cannot be had in a VM",
            "vmruntime.io/kind: host",
        )
        with refused(grpc.StatusCode.FAILED_PRECONDITION, *words):
            create(node, pod, app, "null", "disk", "null")
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "createRuntime", str(vendor.hook), "hooks_in_vms"):
            create(node, pod, app, "hooked", "hooked")
        assert not vendor.marks.exists()
        return
    container = start(node, pod, app, "null", "null", "hooked")
    out(node, container, "echo x > /dev/vendor-null")
    assert out(node, container, "stat -c '%u %g %a %t %T' /dev/vendor-random") == "7 8 640 1 9"
    assert vendor.marks.read_text() == "x hello\n"
    remove(node, container)
    vendor.marks.unlink()


def test_what_is_not_there_is_named(node: Daemon, app: str, pod: tuple[str, str], vendor: Vendor) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "CDI_devices[1].name", "vendor.com/thing=none", str(vendor.run)):
        create(node, pod, app, "none", "both", "none")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "vendor.com/thing=lost", "/nowhere/to/be/found", "No such file"):
        create(node, pod, app, "lost", "lost")
    (vendor.etc / "same.json").write_text((vendor.etc / "vendor.json").read_text())
    try:
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "in two CDI files", "same.json", "vendor.json"):
            create(node, pod, app, "twice", "disk")
    finally:
        (vendor.etc / "same.json").unlink()
    # A change of the files counts at once.
    remove(node, create(node, pod, app, "twice", "disk"))
