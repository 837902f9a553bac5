"""What this machine has of what vmruntime needs: one small function a capability, grouped by theme."""

from __future__ import annotations

from vmruntime.cli.doctor import cgroups, daemon, guest, hooks, hypervisor, image_pods, images, network, pods, system
from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, Check
from vmruntime.config.settings import Settings

CHECKS: tuple[Check, ...] = (
    *system.CHECKS,
    *hypervisor.CHECKS,
    *guest.CHECKS,
    *images.CHECKS,
    *network.CHECKS,
    *image_pods.CHECKS,
    *cgroups.CHECKS,
    *pods.CHECKS,
    *hooks.CHECKS,
    *daemon.CHECKS,
)


def examine(host: Host, settings: Settings) -> list[Capability]:
    """Return every capability of a host, in the order in which a person would put things right."""
    return [check(host, settings) for check in CHECKS]
