"""OCI hooks."""

from __future__ import annotations

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, Check, found, missing
from vmruntime.config.settings import Settings
from vmruntime.daemon.hooks import load_hooks
from vmruntime.errors import FailedPrecondition


def hooks(host: Host, settings: Settings) -> Capability:
    """Whether every hook file can be used; one that cannot refuses every new container."""
    if not settings.hooks_dirs:
        return found("hooks", "none configured")
    try:
        loaded = load_hooks(str(host.root / directory.lstrip("/")) for directory in settings.hooks_dirs)
    except FailedPrecondition as error:
        return missing("hooks", error.message, error.remedy)
    return found("hooks", f"{len(loaded)} in {', '.join(settings.hooks_dirs)}")


CHECKS: tuple[Check, ...] = (hooks,)
