"""AppArmor and SELinux: the guest's kernel has neither; the host's matter to host pods alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.model.container import SecurityContext
from vmruntime.model.sandbox import SandboxKind

APPARMOR_ENABLED = Path("/sys/module/apparmor/parameters/enabled")
APPARMOR_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
SELINUX = Path("/sys/fs/selinux/enforce")
_CONTEXT = "config.linux.security_context"


def label(process: dict[str, Any], security: SecurityContext, kind: SandboxKind) -> None:
    """Put an AppArmor profile into `process` of an OCI configuration, and refuse what would have no effect.

    RuntimeDefault is no profile: none comes with this runtime.

    Raises:
        InvalidArgument: A profile is asked for in a VM.
        FailedPrecondition: The host does not have the profile, or it would have to label the container with SELinux.
    """
    if security.privileged:
        return
    if security.selinux_given and kind is SandboxKind.HOST and SELINUX.exists():
        raise FailedPrecondition(
            f"{_CONTEXT}.selinux_options: given for a container on this host, which has SELinux; it would not be labelled",
            remedy="leave seLinuxOptions out, or run the pod in a VM, where they have no effect",
        )
    if security.apparmor.kind != "localhost":
        return
    field, profile = f"{_CONTEXT}.apparmor.localhost_ref", security.apparmor.path
    if kind is not SandboxKind.HOST:
        raise InvalidArgument.field(
            field,
            profile[:256],
            "cannot be applied: the guest's kernel has no AppArmor, and the host's does not see into the VM",
            remedy="use RuntimeDefault or Unconfined",
        )
    if profile not in loaded_profiles():
        raise FailedPrecondition(
            f"{field}: {profile[:256]!r} is not a loaded AppArmor profile of this host",
            remedy="load it with apparmor_parser(8), or use Unconfined",
        )
    process["apparmorProfile"] = profile


def loaded_profiles() -> set[str]:
    """Return the names of the host's AppArmor profiles; none when it has no AppArmor."""
    try:
        if APPARMOR_ENABLED.read_text().strip() != "Y":
            return set()
        # Each line is a name and, in parentheses, a mode.
        return {line.rpartition(" (")[0] for line in APPARMOR_PROFILES.read_text().splitlines()}
    except OSError:
        return set()
