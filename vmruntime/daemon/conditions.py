"""How the runtime is, for CRI's Status."""

from __future__ import annotations

import json

import msgspec

from vmruntime import __version__
from vmruntime.config.settings import Settings
from vmruntime.daemon.parts import Driver, PodNetworks


class DaemonConditions:
    """Implements cri.ports.Conditions."""

    def __init__(self, settings: Settings, network: PodNetworks, hypervisor: Driver) -> None:
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

    def info(self) -> dict[str, str]:
        """Return what runs and how it is set up."""
        hypervisor = {
            "accelerator": self._hypervisor.accelerator.value,
            "vsock": self._hypervisor.transport.value,
        }
        return {
            "version": json.dumps(__version__),
            "hypervisor": json.dumps(hypervisor),
            "config": msgspec.json.encode(self._settings).decode(),
        }
