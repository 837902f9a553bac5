"""QEMU, acceleration, and the way to the guest's agent."""

from __future__ import annotations

import re
import sqlite3
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.programs import first_line
from vmruntime.cli.doctor.report import Capability, Check, degraded, found, missing
from vmruntime.config.settings import Settings
from vmruntime.hypervisor.devices import ARCHITECTURES
from vmruntime.hypervisor.vsock import PROGRAM, PROGRAM_DIRECTORIES, VHOST_VSOCK
from vmruntime.paths import Paths
from vmruntime.sandboxes.acceleration import FACT, KVM

OLDEST_QEMU = (6, 2)
"""The first version whose machine types, -sandbox and fd passing are all as we use them, and is still maintained."""


def qemu(host: Host, settings: Settings) -> Capability:
    """Whether QEMU is installed and new enough."""
    architecture = ARCHITECTURES.get(host.machine)
    if architecture is None:
        return missing("qemu", f"no VMs on {host.machine}", f"use one of {', '.join(ARCHITECTURES)}")
    name = settings.hypervisor.qemu or architecture.qemu
    path = host.which(name)
    if path is None:
        package = "qemu-system-x86" if host.machine == "x86_64" else "qemu-system-arm"
        return missing("qemu", f"{name} is not installed", f"apt install {package}")
    line = first_line(host.run([path, "--version"]))
    version = re.search(r"version (\d+)\.(\d+)", line)
    if version is None:
        return missing("qemu", f"{path} --version does not answer", "install QEMU again")
    if (int(version.group(1)), int(version.group(2))) < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        return missing("qemu", f"{path}: {line}", f"install QEMU {oldest} or later")
    return found("qemu", f"{path}: {line}")


def kvm(host: Host, settings: Settings) -> Capability:
    """Whether guests run on the processor itself."""
    wanted = settings.hypervisor.accelerator
    name = "kvm"
    if wanted == "tcg":
        return degraded(name, 'not used: hypervisor.accelerator is "tcg"', 'set it to "auto"')

    def without(why: str, remedy: str) -> Capability:
        if wanted == "kvm":
            return missing(name, f'{why}, and hypervisor.accelerator is "kvm"', remedy)
        return degraded(name, f"{why}: guests are emulated (TCG), several times slower", remedy)

    device = host.path(KVM)
    if not device.exists():
        return without(f"{KVM} does not exist", "enable virtualisation in the firmware, or nested virtualisation")
    trouble = host.open_device(device)
    if trouble:
        return without(f"{KVM}: {trouble}", "run doctor as root; load kvm_intel or kvm_amd")
    user = host.account(settings.hypervisor.user)
    if user is not None and not user.may(device.stat(), 6):
        return without(
            f"{user.name} may not open {KVM}",
            f"make it group kvm, mode 0660, and: usermod --append --groups kvm {user.name}",
        )
    return _proof(host, settings, without)


def _proof(host: Host, settings: Settings, without: Callable[[str, str], Capability]) -> Capability:
    """The device alone proves nothing: the daemon boots its own guest on it, once a boot of the host."""
    remembered = _remembered(host.path(Paths(root=Path(settings.root)).database))
    boot_id = (host.read("/proc/sys/kernel/random/boot_id") or "").strip()
    if remembered is None or not boot_id or not remembered.startswith(boot_id):
        return found("kvm", f"{KVM} opens; the daemon proves it by booting its guest when it starts")
    verdict = remembered.partition("\n")[2]
    if verdict == "works":
        return found("kvm", "works: the daemon has booted its guest on it")
    return without(f"{KVM} opens but {verdict}", "enable nested virtualisation in the hypervisor below")


def _remembered(database: Path) -> str | None:
    """Return what the daemon last found out, from its store, without disturbing it."""
    if not database.is_file():
        return None
    try:
        with_uri = f"file:{urllib.parse.quote(str(database))}?mode=ro"
        connection = sqlite3.connect(with_uri, uri=True, timeout=1)
        try:
            row = connection.execute("SELECT value FROM facts WHERE name = ?", (FACT,)).fetchone()
        finally:
            connection.close()
    except sqlite3.Error:
        return None
    return bytes(row[0]).decode(errors="replace") if row is not None else None


def vsock(host: Host, settings: Settings) -> Capability:
    """Whether the host can talk to guests: by the kernel, or by a helper program."""
    wanted = settings.hypervisor.vsock
    device = host.path(VHOST_VSOCK)
    trouble = host.open_device(device) if device.exists() else "does not exist"
    if not trouble and wanted != "vhost-user":
        return found("vsock", f"{VHOST_VSOCK} opens")
    if wanted == "native":
        return missing("vsock", f'{VHOST_VSOCK}: {trouble}, and hypervisor.vsock is "native"', "modprobe vhost_vsock")
    program = _vsock_program(host, settings.hypervisor.vhost_device_vsock)
    if program is not None:
        return found("vsock", f"by {program}")
    return missing(
        "vsock",
        f"{VHOST_VSOCK}: {trouble or 'not wanted'}, and the program {PROGRAM} is not installed",
        f"modprobe vhost_vsock, or cargo install {PROGRAM}",
    )


def _vsock_program(host: Host, configured: str) -> str | None:
    if configured:
        path = host.path(configured) if configured.startswith("/") else None
        return configured if (path is not None and path.is_file()) or host.which(configured) else None
    for directory in PROGRAM_DIRECTORIES:
        if host.path(directory / PROGRAM).is_file():
            return str(directory / PROGRAM)
    return host.which(PROGRAM)


CHECKS: tuple[Check, ...] = (qemu, kvm, vsock)
