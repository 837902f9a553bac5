"""This host's platform, in the words of the OCI image index."""

from __future__ import annotations

import dataclasses
import os

from vmruntime.errors import FailedPrecondition

# uname(2)'s machine → (GOARCH, acceptable variants, best first), as the OCI image index names them.
_MACHINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "x86_64": ("amd64", ("", "v1")),
    "aarch64": ("arm64", ("v8", "")),
    "armv7l": ("arm", ("v7", "v6", "v5", "")),
    "riscv64": ("riscv64", ("",)),
    "ppc64le": ("ppc64le", ("",)),
    "s390x": ("s390x", ("",)),
    "i686": ("386", ("",)),
}


@dataclasses.dataclass(frozen=True)
class Platform:
    """What a guest on this host can run; the operating system is always linux."""

    architecture: str
    variants: tuple[str, ...] = ("",)

    def __str__(self) -> str:
        return f"linux/{self.architecture}"


def host_platform() -> Platform:
    """Return the platform of this host, which is its guests' too.

    Raises:
        FailedPrecondition: A machine no image index has a name for here.
    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise FailedPrecondition(f"images for the machine type {machine!r} are not supported")
    architecture, variants = _MACHINES[machine]
    return Platform(architecture, variants)
