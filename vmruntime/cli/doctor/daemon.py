"""The daemon itself."""

from __future__ import annotations

from pathlib import Path

from vmruntime.cli.client import Client
from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, Check, degraded, found, missing
from vmruntime.config.settings import Settings
from vmruntime.errors import VmruntimeError
from vmruntime.generated import cri_pb2
from vmruntime.paths import Paths

ANSWER_SECONDS = 5.0


def daemon(host: Host, settings: Settings) -> Capability:
    """Whether a daemon answers on the socket, and what it says of itself."""
    address = host.path(settings.socket or Paths(run=Path(settings.run)).socket)
    try:
        with Client.connect(address) as client:
            version = client.call(client.runtime.Version, cri_pb2.VersionRequest(), timeout=ANSWER_SECONDS)
            status = client.call(client.runtime.Status, cri_pb2.StatusRequest(), timeout=ANSWER_SECONDS).status
    except VmruntimeError as error:
        return missing("daemon", error.message, error.remedy, essential=False)
    who = f"{version.runtime_name} {version.runtime_version}"
    for condition in status.conditions:
        if not condition.status:
            why = f"{who}: not {condition.type}: {condition.reason} {condition.message}".rstrip()
            return degraded("daemon", why, "see the lines above")
    return found("daemon", f"{who} answers on {address}")


CHECKS: tuple[Check, ...] = (daemon,)
