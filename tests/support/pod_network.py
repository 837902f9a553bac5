"""A network service with the real plugins and a bridge, or a ptp, of its own."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from vmruntime.config.settings import NetworkSettings
from vmruntime.model.sandbox import Sandbox, SandboxKind, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.network.service import NetworkService
from vmruntime.network.tap import SpareTap
from vmruntime.paths import Paths

PLUGINS = "/usr/lib/cni"
MTU = 1410


class PodNetworks:
    """Pods of one CNI network that nobody else has.

    Attributes:
        service: The service, of which restarted() makes another one.
        plugin: Of CNI.
        subnet: The first three numbers of its addresses; the gateway is the first.
        bridge: The host's side of a bridge network.
    """

    def __init__(self, base: Path, plugin: str) -> None:
        self.plugin = plugin
        number = secrets.randbelow(2**13)
        self.subnet = f"10.{224 + number // 256}.{number % 256}"
        self.v6 = f"fd{secrets.token_hex(1)}:{number:x}::"
        self.bridge = f"vmrtb{secrets.token_hex(3)}"
        self.paths = Paths(root=base / "root", run=base / "run")
        self.conf_dir = base / "net.d"
        self.conf_dir.mkdir(parents=True)
        ranges = [[{"subnet": f"{self.subnet}.0/24"}], [{"subnet": f"{self.v6}/64"}]]
        routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
        chain: dict[str, Any] = {
            "type": plugin,
            "mtu": MTU,
            "ipam": {"type": "host-local", "dataDir": str(base / "ipam"), "ranges": ranges, "routes": routes},
            "dns": {"nameservers": [f"{self.subnet}.53"], "search": ["from-the-network"]},
        }
        if plugin == "bridge":
            chain |= {"bridge": self.bridge, "isGateway": True}
        conf = {"cniVersion": "1.0.0", "name": f"net-{self.bridge}", "plugins": [chain]}
        (self.conf_dir / "10-net.conflist").write_text(json.dumps(conf))
        self.bin_dirs = [PLUGINS]
        self.service = self.restarted()

    @property
    def gateway(self) -> str:
        return f"{self.subnet}.1"

    def restarted(self) -> NetworkService:
        """Return the service as another daemon would have it."""
        return NetworkService(self.paths, NetworkSettings(conf_dir=str(self.conf_dir), bin_dirs=self.bin_dirs))

    def add_plugin(self, directory: Path, script: str) -> None:
        """Append a plugin of a shell script to the network; its request is in $request."""
        directory.mkdir(exist_ok=True)
        program = directory / f"plugin-{secrets.token_hex(3)}"
        program.write_text(f"#!/bin/sh\nPATH=$PATH:/usr/sbin:/sbin\nrequest=$(cat)\n{script}\n")
        program.chmod(0o755)
        path = self.conf_dir / "10-net.conflist"
        conf = json.loads(path.read_text())
        conf["plugins"].append({"type": program.name})
        path.write_text(json.dumps(conf))
        self.bin_dirs.append(str(directory))
        self.service = self.restarted()

    @contextlib.asynccontextmanager
    async def pod(self, kind: SandboxKind = SandboxKind.IMAGE, spare: SpareTap | None = None) -> AsyncIterator[Sandbox]:
        """Yield a sandbox that has its network, with no tap open but the spare one."""
        spec = SandboxSpec(metadata=SandboxMetadata(name="web", uid="uid-web", namespace="default"), kind=kind)
        sandbox = Sandbox(id=secrets.token_hex(32), spec=spec, state=SandboxState.CREATING, created_at=0)
        network, taps = await self.service.add(sandbox, spare)
        try:
            for tap in taps:
                tap.close()
            yield msgspec.structs.replace(sandbox, network=network)
        finally:
            await self.service.teardown(sandbox.id)
            assert not Path(network.netns).exists()

    def end(self) -> None:
        """Remove the host's side."""
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, stderr=subprocess.DEVNULL)
