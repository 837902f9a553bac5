"""Linux capabilities (capabilities(7))."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.model.container import SecurityContext


def _set(names: str) -> tuple[str, ...]:
    return tuple(f"CAP_{name}" for name in names.split())


# By number, CAP_CHOWN = 0 to CAP_CHECKPOINT_RESTORE = 40 (linux/capability.h).
ALL = _set("""
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
""")
# What Docker, containerd and CRI-O give: images are built against this set.
DEFAULT = _set("""
    CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE
    SETFCAP
""")


def of_this_process() -> tuple[str, ...]:
    """Return the capabilities that programs this process starts can have (proc(5), CapBnd)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    mask = int(next(line.split()[1] for line in lines if line.startswith("CapBnd:")), 16)
    return tuple(name for number, name in enumerate(ALL) if mask >> number & 1)


def bounding(security: SecurityContext, available: Sequence[str] = ALL) -> list[str]:
    """Return the capabilities a container may have at all, in the kernel's order.

    "ALL" is applied before single names, adding before dropping, so `drop: [ALL], add: [CHOWN]` leaves CHOWN.

    Args:
        security: What is asked for.
        available: Those that there are; "ALL", and being privileged, mean no more than these.

    Raises:
        InvalidArgument: A capability is unknown.
        FailedPrecondition: One that is asked for by name is not available.
    """
    if security.privileged:
        return [name for name in ALL if name in available]
    add = _names("capabilities.add_capabilities", security.add_capabilities)
    drop = _names("capabilities.drop_capabilities", security.drop_capabilities)
    ambient = _names("capabilities.add_ambient_capabilities", security.add_ambient_capabilities)
    found = set(DEFAULT)
    if "ALL" in add or "ALL" in ambient:
        found = set(ALL)
    if "ALL" in drop:
        found = set()
    named = (add | ambient) - {"ALL"} - drop
    for name in sorted(named - set(available)):
        raise FailedPrecondition(
            f"config.linux.security_context.capabilities: {name} cannot be given to a container on this host: vmruntime's"
            " daemon does not have it",
            remedy="start the daemon with it, or run the pod in a VM",
        )
    found = (found - drop) | named
    return [name for name in ALL if name in found and name in available]


def capability_sets(security: SecurityContext, available: Sequence[str] = ALL) -> dict[str, list[str]]:
    """Return process.capabilities of the OCI configuration.

    For a user other than root the kernel clears effective and permitted at setuid, except for what is ambient.
    Inheritable holds only what ambient needs: more would let files' capabilities grow (CVE-2022-24769).

    Args:
        security: What is asked for.
        available: See bounding().

    Raises:
        InvalidArgument: A capability is unknown.
        FailedPrecondition: One that is asked for by name is not available.
    """
    allowed = bounding(security, available)
    wanted = _names("capabilities.add_ambient_capabilities", security.add_ambient_capabilities)
    ambient = [name for name in allowed if name in wanted or "ALL" in wanted]
    return {
        "bounding": allowed,
        "effective": list(allowed),
        "permitted": list(allowed),
        "inheritable": ambient,
        "ambient": list(ambient),
    }


def _names(field: str, given: Iterable[str]) -> set[str]:
    names = set()
    for one in given:
        name = one.upper().removeprefix("CAP_")
        if name != "ALL" and f"CAP_{name}" not in ALL:
            raise InvalidArgument.field(
                f"config.linux.security_context.{field}",
                one[:64],
                "is not a Linux capability",
                remedy="use a name of capabilities(7), or ALL",
            )
        names.add("ALL" if name == "ALL" else f"CAP_{name}")
    return names
