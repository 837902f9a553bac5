"""The guest that container pods boot."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, Check, degraded, found, missing
from vmruntime.config.settings import Settings

SCHEMA = 1
REMEDY = "vmruntime guest build, or make guest in the source tree"


class GuestInfo(msgspec.Struct, frozen=True):
    """What guest.json says of the files beside it."""

    schema: int
    arch: str
    kernel: str
    kernel_release: str
    agent_version: str
    crun_version: str
    initramfs_sha256: str
    kernel_sha256: str


def guest(host: Host, settings: Settings) -> Capability:
    """Whether the guest's files are there, belong together and fit this machine."""
    directory = settings.guest_directory
    here = host.path(directory)
    for name in ("vmlinuz", "initramfs.img"):
        if not (here / name).is_file():
            return missing("guest", f"{directory / name} does not exist", REMEDY)
    try:
        info = msgspec.json.decode((here / "guest.json").read_bytes(), type=GuestInfo)
    except FileNotFoundError:
        return degraded("guest", f"{directory / 'guest.json'} does not exist, so nothing says what this is", REMEDY)
    except (OSError, msgspec.MsgspecError) as error:
        return degraded("guest", f"{directory / 'guest.json'}: {error}", REMEDY)
    if info.schema != SCHEMA:
        return degraded("guest", f"guest.json has schema {info.schema}; this version knows {SCHEMA}", REMEDY)
    if info.arch != host.machine:
        return missing("guest", f"it is for {info.arch}, and this machine is {host.machine}", REMEDY)
    for name, digest in (("vmlinuz", info.kernel_sha256), ("initramfs.img", info.initramfs_sha256)):
        try:
            actual = _sha256(here / name)
        except OSError as error:
            return missing("guest", f"{directory / name}: {error.strerror}", REMEDY)
        if actual != digest:
            return missing("guest", f"{directory / name} is not the file guest.json describes", REMEDY)
    why = f"{info.kernel} kernel {info.kernel_release}, agent {info.agent_version}, crun {info.crun_version}"
    if info.kernel != "minimal":
        return degraded("guest", f"{why}: boots slower than the minimal kernel", "make kernel, then make guest")
    return found("guest", why)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CHECKS: tuple[Check, ...] = (guest,)
