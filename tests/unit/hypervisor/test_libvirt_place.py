from __future__ import annotations

import socket
from pathlib import Path
from pwd import struct_passwd

import libvirt
import pytest

from vmruntime.hypervisor.interface import VmEnd
from vmruntime.hypervisor.libvirt.ending import told_by_libvirt
from vmruntime.hypervisor.libvirt.place import (
    SYSTEM,
    choose_uri,
    embedded_uri,
    is_embedded,
    prepare_embedded,
    qemu_conf,
)

ACCOUNT = struct_passwd(("vmruntime", "x", 999, 995, "", "/nonexistent", "/usr/sbin/nologin"))


def test_a_setting_is_taken_as_it_is(tmp_path: Path) -> None:
    assert choose_uri("qemu+ssh://elsewhere/system", tmp_path / "libvirt") == "qemu+ssh://elsewhere/system"
    assert not (tmp_path / "libvirt").exists()


def test_a_daemon_that_answers_is_preferred(tmp_path: Path) -> None:
    directory, path = tmp_path / "libvirt", tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert choose_uri("", directory, (tmp_path / "none", path)) == SYSTEM
    assert choose_uri("", directory, (path,)) == SYSTEM  # away for a moment, the machines are still its own


def test_without_a_daemon_the_driver_runs_inside(tmp_path: Path) -> None:
    directory, path = tmp_path / "libvirt", tmp_path / "sock"
    path.touch()  # left behind: nobody listens
    uri = choose_uri("", directory, (path,))
    assert uri == embedded_uri(directory)
    assert is_embedded(uri)
    assert not is_embedded(SYSTEM)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert choose_uri("", directory, (path,)) == uri  # a daemon that came later does not know the machines


def test_the_driver_inside_changes_no_owner_and_no_cgroup(tmp_path: Path) -> None:
    directory = tmp_path / "libvirt"
    prepare_embedded(embedded_uri(directory), ACCOUNT)
    lines = (directory / "etc" / "qemu.conf").read_text().splitlines()
    assert {"dynamic_ownership = 0", "cgroup_controllers = []", "seccomp_sandbox = 1"} <= set(lines)
    assert directory.stat().st_mode & 0o777 == 0o711


@pytest.mark.parametrize(("may", "user"), [(True, "+999"), (False, "root")])
def test_libvirts_own_account_can_open_kvm(may: bool, user: str) -> None:
    assert f'user = "{user}"' in qemu_conf(ACCOUNT, may_use_kvm=may).splitlines()


@pytest.mark.parametrize(
    ("state", "reason", "end"),
    [
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, VmEnd.POWEROFF),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED, VmEnd.KILLED),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED, VmEnd.LOST),
        (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN, VmEnd.LOST),
        (libvirt.VIR_DOMAIN_CRASHED, libvirt.VIR_DOMAIN_CRASHED_PANICKED, VmEnd.CRASH),
    ],
)
def test_what_libvirt_remembers_of_an_end(state: int, reason: int, end: VmEnd) -> None:
    told = told_by_libvirt(state, reason)
    assert told is not None
    assert told.end is end


@pytest.mark.parametrize("state", [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_SHUTDOWN])
def test_a_domain_that_has_not_ended(state: int) -> None:
    assert told_by_libvirt(state, 1) is None
