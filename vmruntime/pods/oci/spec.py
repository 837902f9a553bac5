"""The whole OCI runtime configuration (runtime-spec 1.0.2 config.json), for crun in the guest.

What is not in it, and why:
 - root.path, cgroupsPath, the mounts of /etc/hosts, /etc/hostname, /etc/resolv.conf and /dev/shm, and the user's
   numbers: the agent knows them and fills them in.
 - network, IPC and UTS namespaces, hostname and sysctls: they are the whole guest's, so containers of a pod share them.
 - rlimits: containers have what the agent has, as CRI has no field for them.
 - SELinux labels, and AppArmor in a VM: see lsm.py.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

from vmruntime.model.container import ContainerSpec, SecurityContext
from vmruntime.model.image import ImageConfig
from vmruntime.model.sandbox import SandboxSpec
from vmruntime.pods.oci.capabilities import ALL, capability_sets
from vmruntime.pods.oci.lsm import label
from vmruntime.pods.oci.mounts import BindMount, container_mounts, root_propagation
from vmruntime.pods.oci.process import arguments, directory, environment
from vmruntime.pods.oci.resources import device_rules, guest_resources, resource_limits
from vmruntime.pods.oci.seccomp import seccomp_filter

# What kubelet sends for procMount: Default. Taken for an empty list too, since protobuf cannot tell "none" from "not
# given" and clients that say nothing should not see the guest's kernel laid open. In a user namespace an empty list is
# none: kubelet allows procMount: Unmasked there alone (KEP-4265), and the kernel guards what is not the namespace's.
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def build_oci_spec(
    container: ContainerSpec,
    image: ImageConfig,
    sandbox: SandboxSpec,
    *,
    load_profile: Callable[[str], bytes],
    volumes: Sequence[BindMount] = (),
    architecture: str = platform.machine(),
    capabilities: Sequence[str] = ALL,
) -> dict[str, Any]:
    """Return a container's configuration as the guest's agent expects it.

    Args:
        container: What CreateContainer asked for.
        image: The image's own configuration.
        sandbox: The pod, for its host name.
        load_profile: Reads a Localhost seccomp profile from this host.
        volumes: What to mount besides the kernel's file systems, in CRI's order.
        architecture: The guest's machine, x86_64 or aarch64.
        capabilities: Those there are to give.

    Raises:
        InvalidArgument: There is no command, a capability is unknown, or a profile cannot be used.
        FailedPrecondition: A capability that is asked for is not there to give.
    """
    security = container.security
    given = capability_sets(security, capabilities)
    process: dict[str, Any] = {
        "terminal": container.tty,
        "user": {"uid": 0, "gid": 0},
        "args": arguments(container, image),
        "env": environment(container, image, sandbox.hostname),
        "cwd": directory(container, image),
        "capabilities": given,
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": container.resources.oom_score_adj,
    }
    linux: dict[str, Any] = {
        "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
        "resources": {
            "devices": device_rules(privileged=security.privileged),
            **resource_limits(guest_resources(container.resources, sandbox.kind)),
        },
        "maskedPaths": _paths(sandbox, security, security.masked_paths, MASKED_PATHS),
        "rootfsPropagation": root_propagation(volumes),
        "readonlyPaths": _paths(sandbox, security, security.readonly_paths, READONLY_PATHS),
    }
    label(process, security, sandbox.kind)
    if not security.privileged:
        seccomp = seccomp_filter(security.seccomp, given["bounding"], architecture, load_profile)
        if seccomp is not None:
            linux["seccomp"] = seccomp
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": security.readonly_rootfs},
        "process": process,
        "mounts": container_mounts(
            volumes,
            privileged=security.privileged,
            user_namespace=sandbox.namespaces.user_namespace is not None,
        ),
        "linux": linux,
        # crun obeys some of those that are named after it.
        "annotations": {key: value for key, value in container.annotations.items() if not key.startswith("run.oci.")},
    }


def _paths(sandbox: SandboxSpec, security: SecurityContext, given: list[str], default: tuple[str, ...]) -> list[str]:
    if security.privileged:
        return []
    return list(given) or list(default if sandbox.namespaces.user_namespace is None else ())
