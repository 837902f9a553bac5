"""How the runtime is, for CRI's Status."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from vmruntime import __version__
from vmruntime.config.settings import Settings
from vmruntime.daemon.parts import Driver, PodNetworks
from vmruntime.model.sandbox import SandboxKind


class _Guest(msgspec.Struct):
    """What is read of guest.json."""

    kernel_release: str = ""


class DaemonConditions:
    """Implements cri.ports.Conditions."""

    def __init__(
        self,
        settings: Settings,
        network: PodNetworks,
        hypervisor: Driver,
        start_state: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        """Take what is asked.

        Args:
            settings: The configuration.
            network: Pod networks.
            hypervisor: The driver of container pods.
            start_state: Says which templates and warm VMs there are.
        """
        self._start_state = start_state
        self._settings = settings
        self._network = network
        self._hypervisor = hypervisor

    async def runtime_ready(self) -> tuple[bool, str, str]:
        """Return whether there is a guest to boot."""
        for name in ("vmlinuz", "initramfs.img"):
            file = self._settings.guest_directory / name
            if not file.is_file():
                return False, "GuestMissing", f"there is no guest to boot: {file} is missing (make guest)"
        return True, "", ""

    async def network_ready(self) -> tuple[bool, str, str]:
        """Return whether CNI can give pods an address."""
        ready, why = await self._network.ready()
        return ready, "" if ready else "NetworkPluginNotReady", "" if ready else why

    def user_namespaces(self, kind: SandboxKind) -> bool:
        """Return whether the kernel that runs a kind's containers can map their root file systems.

        overlayfs takes mapped layers, and EROFS can be mapped, since Linux 5.19; volumes are mapped by the host, 5.12.
        """
        host = _version(os.uname().release)
        if kind is SandboxKind.CONTAINER:
            return host >= (5, 12) and _version(self._guest_kernel()) >= (5, 19)
        return kind is SandboxKind.HOST and host >= (5, 19) and _host_limit() > 0

    def _guest_kernel(self) -> str:
        try:
            about = (self._settings.guest_directory / "guest.json").read_bytes()
            return msgspec.json.decode(about, type=_Guest).kernel_release
        except (OSError, msgspec.MsgspecError):
            return ""

    def info(self) -> dict[str, str]:
        """Return what runs and how it is set up."""
        hypervisor = {
            "accelerator": self._hypervisor.accelerator.value,
            "vsock": self._hypervisor.transport.value,
        }
        return {
            "version": json.dumps(__version__),
            "hypervisor": json.dumps(hypervisor),
            "start": json.dumps(self._start_state()),
            "config": msgspec.json.encode(self._settings).decode(),
        }


def _version(release: str) -> tuple[int, int]:
    """Return a kernel's version from its release, such as 6.1.0-18-amd64."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _host_limit() -> int:
    """Return how many user namespaces the host's kernel lets anybody make."""
    try:
        return int(Path("/proc/sys/user/max_user_namespaces").read_text())
    except (OSError, ValueError):
        return 0
