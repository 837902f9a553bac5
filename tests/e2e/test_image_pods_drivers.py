"""Image pods on each of those who can run them but the default, which the other tests have."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import vm_images
from tests.support.image_pods import boot, image_daemon, pull, up_and_down
from tests.support.libvirtd import libvirtd
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

SMALL = "virtlet.cloud/small"
GUEST_SETTINGS = "[guest]\nimage_memory_mib = 256\n"


def test_qemu_without_libvirt_runs_machines(base: Path) -> None:
    extra = f'{GUEST_SETTINGS}[hypervisor]\nimage_pods = "qemu"\n'
    with image_daemon(base / "qemu", {"small": vm_images.small().as_uri()}, extra) as daemon:
        pull(daemon, SMALL)
        up_and_down(daemon, "plain", SMALL)


def test_a_libvirtd_runs_machines_and_may_be_restarted(base: Path) -> None:
    with libvirtd(base / "libvirtd") as server:
        extra = f'{GUEST_SETTINGS}[hypervisor]\nimage_pods = "libvirt"\nlibvirt_uri = "{server.uri}"\n'
        with image_daemon(base / "lv", {"small": vm_images.small().as_uri()}, extra) as daemon:

            def listed() -> str:
                argv = ["virsh", "-c", server.uri, "list", "--all"]
                return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

            pull(daemon, SMALL)
            machine = boot(daemon, "managed", SMALL)
            machine.wait_agent()
            name = f"test-managed-{machine.pod[:8]}"
            assert f" {name} " in listed()
            assert machine.info()["machine"]["driver"] == "libvirt"
            boot_id = machine.out("cat /proc/sys/kernel/random/boot_id")
            server.stop()
            assert machine.status().state == cri.CONTAINER_RUNNING
            server.start()
            assert [line.split()[1:] for line in listed().splitlines() if name in line] == [[name, "running"]]
            machine.wait_agent()
            assert machine.out("cat /proc/sys/kernel/random/boot_id") == boot_id
            machine.stop(60)
            ended = machine.status()
            assert (ended.exit_code, ended.reason) == (0, "Completed"), ended.message
            daemon.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=machine.pod))
            assert name not in listed()
