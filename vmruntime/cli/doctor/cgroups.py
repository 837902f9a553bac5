"""Cgroups, in which a pod's VM and its helpers are kept."""

from __future__ import annotations

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, Check, degraded, found, missing
from vmruntime.config.settings import Settings

WANTED = ("cpu", "memory", "pids")
ROOT = "/sys/fs/cgroup"


def controllers(host: Host, settings: Settings) -> Capability:
    """Whether the kernel can account for and limit pods."""
    unified = host.read(f"{ROOT}/cgroup.controllers")
    if unified is not None:
        version, present = "v2", set(unified.split())
    else:
        version = "v1"
        present = {name for name in WANTED if host.path(f"{ROOT}/{name}").is_dir()}
        if not present:
            return missing("cgroups", f"nothing is mounted on {ROOT}", f"mount -t cgroup2 none {ROOT}", essential=False)
    absent = [name for name in WANTED if name not in present]
    if absent:
        return degraded(
            "cgroups", f"cgroup {version} without {', '.join(absent)}", "enable them on the kernel's command line"
        )
    return found("cgroups", f"cgroup {version} with {', '.join(WANTED)}")


def driver(host: Host, settings: Settings) -> Capability:
    """Whether the cgroup driver told to kubelet fits this machine."""
    has_systemd = host.path("/run/systemd/system").is_dir()
    if settings.cgroup_driver == "systemd" and not has_systemd:
        return missing("cgroup driver", "systemd does not run here", 'set cgroup_driver to "cgroupfs"')
    if settings.cgroup_driver == "cgroupfs" and has_systemd:
        why = "cgroupfs, while systemd manages the cgroups here; kubelet's cgroupDriver has to be the same"
        return degraded("cgroup driver", why, 'set cgroup_driver to "systemd" here and in kubelet')
    return found("cgroup driver", settings.cgroup_driver)


CHECKS: tuple[Check, ...] = (controllers, driver)
