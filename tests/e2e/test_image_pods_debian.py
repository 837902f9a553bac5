"""A real Debian 12 cloud image as a pod: from a registry as a containerDisk, set up by cloud-init, stopped in good order."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leaks, registry, vm_images
from tests.support.daemon import Daemon, running_daemon
from tests.support.image_pods import Machine, boot, pull, ssh, ssh_key, wait_until
from tests.support.pods import run_pod as run_container_pod
from tests.support.pods import sh
from tests.support.pods import start as start_container
from vmruntime.generated import cri_pb2 as cri

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

BOOT_SECONDS = 400.0
"""systemd and cloud-init on a busy host without hardware virtualisation; half a minute with it."""

IMAGE = "registry.example/vms/debian:12"


@pytest.fixture(scope="module")
def site(base: Path) -> Iterator[Daemon]:
    """A daemon whose registry.example is a real registry on loopback, with a containerDisk of Debian."""
    directory = base / "debian"
    directory.mkdir()
    with registry.registry(directory / "registry") as mirror:
        mirror.copy(f"oci-archive:{vm_images.containerdisk('debian')}", "vms/debian:12")
        conf = registry.mirror_conf(directory / "registries.conf", "registry.example", mirror.address, mirror.address)
        with running_daemon(directory / "d", f'[images]\nregistries_conf = "{conf}"') as daemon:
            yield daemon


@pytest.fixture(scope="module")
def key(base: Path) -> tuple[Path, str]:
    """An SSH key: its file, and the public one."""
    (base / "debian-ssh").mkdir()
    return ssh_key(base / "debian-ssh")


@pytest.fixture(scope="module")
def settings(base: Path) -> Path:
    """A directory as kubelet has a ConfigMap's."""
    volume = base / "debian-kubelet" / "kubernetes.io~configmap" / "settings"
    (volume / "..1").mkdir(parents=True)
    (volume / "..1" / "colour").write_text("green\n")
    (volume / "..data").symlink_to("..1")
    (volume / "colour").symlink_to("..data/colour")
    return volume


@pytest.fixture(scope="module")
def machine(site: Daemon, key: tuple[Path, str], settings: Path) -> Machine:
    """The pod, with cloud-init at its end."""
    reference = pull(site, IMAGE)
    user_data = {"write_files": [{"path": "/etc/greeting", "content": "hello, Debian\n"}], "runcmd": ["touch /run/ran"]}
    found = boot(
        site,
        "debian",
        reference,
        {
            "vmruntime.io/vcpus": "2",
            "vmruntime.io/ssh-keys": key[1],
            "vmruntime.io/cloud-init-user-data": json.dumps(user_data),
        },
        pod_fields={"hostname": "debian-vm"},
        mounts=[cri.Mount(container_path="/etc/settings", host_path=str(settings), readonly=True)],
    )
    wait_until(lambda: " finished at " in found.log(), lambda: found.log()[-3000:], BOOT_SECONDS)
    found.wait_agent()
    finished = "/run/cloud-init/result.json"
    wait_until(lambda: found.exec("test", "-s", finished).exit_code == 0, lambda: found.log()[-3000:])
    assert json.loads(found.out(f"cat {finished}"))["v1"]["errors"] == []
    return found


@pytest.fixture(autouse=True)
def clean(site: Daemon) -> Iterator[None]:
    pods, containers = site.pods(), site.containers()
    with leaks.nothing_left(site.footprint, lambda: site.remove_all_but(pods, containers), kept=pods | containers):
        yield


def test_cloud_init_has_done_what_was_asked(machine: Machine) -> None:
    assert machine.out("cat /etc/greeting") == "hello, Debian"
    assert machine.out("hostname") == "debian-vm"
    assert machine.out("ls /run/ran") == "/run/ran"
    assert machine.out(". /etc/os-release && echo $VERSION_ID") == "12"
    assert machine.ip in machine.out("ip -4 -o addr show scope global")
    assert machine.out("cat /etc/settings/colour") == "green"
    assert "virtiofs" in machine.out("findmnt -no FSTYPE /etc/settings")


def test_ssh_with_the_pods_key(machine: Machine, key: tuple[Path, str]) -> None:
    assert ssh(key[0], machine.ip, "cat /etc/greeting; sudo id -u", "debian") == "hello, Debian\n0\n"


def test_another_pod_reaches_it_by_ping_http_and_ssh(
    site: Daemon, machine: Machine, key: tuple[Path, str], busybox: str
) -> None:
    machine.exec("systemd-run", "--unit=page", "python3", "-m", "http.server", "8000", "-d", "/etc/settings")
    image = str(site.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox))).image_ref)
    pod = run_container_pod(site, "client")
    client = start_container(site, pod, image, "main", "sleep 1000")
    assert sh(site, client, f"ping -c 1 -W 5 {machine.ip}").exit_code == 0
    through = [sys.executable, "-m", "vmruntime.cli.main", "--config", str(site.config), "exec", "-i", client]
    via = shlex.join([*through, "--", "nc", machine.ip, "22"])
    assert ssh(key[0], machine.ip, "hostname", "debian", via=via).strip() == "debian-vm"
    deadline = time.monotonic() + 60
    ask = f"printf 'GET /colour HTTP/1.0\\r\\n\\r\\n' | nc {machine.ip} 8000"
    while not sh(site, client, ask).stdout.endswith(b"green\n"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    site.images.RemoveImage(cri.RemoveImageRequest(image=cri.ImageSpec(image=image)))


def test_a_restart_of_the_daemon_loses_nothing(site: Daemon, machine: Machine) -> None:
    before = machine.log()
    machine.out("echo said before >/dev/ttyS0")
    machine.wait_for_log("said before")
    site.stop()
    site.start()
    machine.wait_agent(BOOT_SECONDS)
    machine.out("echo said after >/dev/ttyS0")
    machine.wait_for_log("said after")
    assert machine.log().startswith(before)
    assert machine.log().count("said before") == 1


def test_a_graceful_stop_is_in_the_guests_journal(site: Daemon, machine: Machine) -> None:
    machine.stop(180)
    ended = machine.status()
    assert (ended.exit_code, ended.reason) == (0, "Completed")
    second = machine.again()
    second.wait_agent(BOOT_SECONDS)
    journal = second.out("journalctl -b -1 --no-pager -q | tail -n 300")
    assert "Power key pressed" in journal or "power button" in journal.lower() or "Powering off" in journal
    assert "Reached target" in journal
    second.stop(0)
