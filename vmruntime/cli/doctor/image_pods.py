"""What image pods need or may ask for: libvirt, firmware other than BIOS, a TPM."""

from __future__ import annotations

import sys

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.programs import program
from vmruntime.cli.doctor.report import Capability, Check, degraded, found, missing
from vmruntime.config.settings import Settings
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.firmware import find_ovmf

OLDEST_LIBVIRT = 9_000_000
"""Of libvirt's library, as it counts: disks as open files came with 9.0.0."""

LIBVIRT_SOCKETS = ("/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock")
LIBVIRT_PACKAGES = "apt install libvirt-daemon-driver-qemu libvirt-dev, and pip install 'vmruntime[libvirt]'"


def libvirt(host: Host, settings: Settings) -> Capability:
    """Whether libvirt can run the VMs of image pods, so that virsh shows them."""
    wanted = settings.hypervisor.image_pods
    if wanted == "qemu":
        return found("libvirt", 'not wanted: hypervisor.image_pods is "qemu"')
    # Not in this process, where libvirt's library would begin to log.
    said = (host.run([sys.executable, "-c", "import libvirt; print(libvirt.getVersion())"]) or "").strip()
    why = ""
    if not said.isdecimal():
        why = "this Python has no library for libvirt"
    elif int(said) < OLDEST_LIBVIRT:
        why = f"libvirt {_readable(int(said))} is older than {_readable(OLDEST_LIBVIRT)}"
    if not why:
        by = next((path for path in LIBVIRT_SOCKETS if host.path(path).exists()), "")
        uri = settings.hypervisor.libvirt_uri or (
            f"the daemon at {by}" if by else "no daemon of it runs, so inside ours"
        )
        return found("libvirt", f"{_readable(int(said))}, {uri}")
    if wanted == "libvirt":
        remedy = f'{LIBVIRT_PACKAGES}; or set hypervisor.image_pods to "qemu"'
        return missing("libvirt", f'{why}, and hypervisor.image_pods is "libvirt"', remedy, essential=False)
    return degraded("libvirt", f"{why}: QEMU runs image pods by itself, and virsh does not show them", LIBVIRT_PACKAGES)


def uefi(host: Host, settings: Settings) -> Capability:
    """Whether image pods can boot by UEFI."""
    try:
        code, _ = find_ovmf(host.machine, host.root)
    except FailedPrecondition as error:
        why = f"there is no OVMF for {host.machine}; image pods can boot by BIOS only"
        return missing("uefi", why, error.remedy, essential=False)
    return found("uefi", f"/{code.relative_to(host.root)}")


def _readable(version: int) -> str:
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"


CHECKS: tuple[Check, ...] = (
    libvirt,
    uefi,
    program("swtpm", "is the TPM of image pods that ask for one", "swtpm", essential=False),
)
