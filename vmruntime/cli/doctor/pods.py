"""What single kinds of pods need: volumes in VMs, and host pods."""

from __future__ import annotations

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, Check, found, missing
from vmruntime.config.settings import Settings
from vmruntime.sandboxes.host_programs import DIRECTORIES
from vmruntime.volumes.virtiofsd import PROGRAMS


def virtiofsd(host: Host, settings: Settings) -> Capability:
    """Whether pods in VMs can have volumes."""
    configured = settings.volumes.virtiofsd
    wanted = [configured] if configured else [*PROGRAMS, "virtiofsd"]
    path = _first(host, wanted)
    if path is None:
        return missing(
            "virtiofsd",
            f"none of {', '.join(wanted)} is there; pods in VMs can have no volumes",
            "apt install qemu-system-common (Debian 12) or virtiofsd (later), or set volumes.virtiofsd",
            essential=False,
        )
    return found("virtiofsd", path)


def host_pods(host: Host, settings: Settings) -> Capability:
    """Whether the programs of host pods are there."""
    if settings.host_pods == "never":
        return found("host pods", "switched off (host_pods)")
    programs = {"host.agent": (settings.host.agent, "vmruntime-agent"), "host.crun": (settings.host.crun, "crun")}
    paths = []
    for key, (configured, name) in programs.items():
        path = _first(host, [configured] if configured else [*(str(one / name) for one in DIRECTORIES), name])
        if path is None:
            why = f"{configured or name} is not on this host; pods that need its namespaces cannot run"
            return missing("host pods", why, f"make setup, or set {key}", essential=False)
        paths.append(path)
    return found("host pods", " and ".join(paths))


def _first(host: Host, candidates: list[str]) -> str | None:
    """Return the first program that is there; a name without a slash is looked for in PATH."""
    return next((path for one in candidates if (path := host.which(one))), None)


CHECKS: tuple[Check, ...] = (virtiofsd, host_pods)
