"""Where distributions keep UEFI firmware, as a table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmruntime.errors import FailedPrecondition

Pair = tuple[str, str]
"""The code, and the template of its variables: both of one build, since their sizes belong together."""

OVMF: Mapping[str, Sequence[Pair]] = {
    "x86_64": (
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),  # Debian 11, Ubuntu 22.04 and later
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),  # older ones
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),  # Fedora, CentOS Stream
        ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),  # Arch Linux
    ),
    "aarch64": (
        ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),  # Debian, Ubuntu
        (
            "/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw",  # Fedora, CentOS Stream
            "/usr/share/edk2/aarch64/vars-template-pflash.raw",
        ),
    ),
}
PACKAGES = {
    "x86_64": "ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora)",
    "aarch64": "qemu-efi-aarch64 (Debian, Ubuntu) or edk2-aarch64 (Fedora)",
}


def find_ovmf(machine: str = "", root: Path = Path("/")) -> tuple[Path, Path]:
    """Return UEFI's code, and a template of its variables that each machine has its own copy of.

    Args:
        machine: As of uname(2); empty: this host's.
        root: Where the file system begins.

    Raises:
        FailedPrecondition: It is not installed.
    """
    machine = machine or os.uname().machine
    for pair in OVMF.get(machine, ()):
        code, variables = (root / path.lstrip("/") for path in pair)
        if code.is_file() and variables.is_file():
            return code, variables
    raise FailedPrecondition(
        f"firmware 'uefi': there is no OVMF for {machine} on this host",
        remedy=f"install the package {PACKAGES.get(machine, 'ovmf')}",
    )
