"""Where vmruntime keeps its files.

`root` holds what survives a reboot (images, store), `run` what does not (sockets, VM state, network namespaces).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Paths:
    """The directory layout, derived from two roots.

    Attributes:
        root: Persistent state, default /var/lib/vmruntime.
        run: State that ends with the host's boot, default /run/vmruntime.
    """

    root: Path = Path("/var/lib/vmruntime")
    run: Path = Path("/run/vmruntime")

    @property
    def socket(self) -> Path:
        """The CRI socket."""
        return self.run / "vmruntime.sock"

    @property
    def lock(self) -> Path:
        """Held by the one daemon that owns these directories."""
        return self.run / "daemon.lock"

    @property
    def database(self) -> Path:
        """The SQLite store."""
        return self.root / "vmruntime.db"

    @property
    def guest(self) -> Path:
        """vmlinuz, initramfs.img and guest.json of the guest that container pods boot."""
        return self.root / "guest"

    @property
    def layers(self) -> Path:
        """EROFS images of layers, one file a diffID."""
        return self.root / "layers"

    @property
    def disks(self) -> Path:
        """Disks of VM images, one file a digest; VMs' account opens them by path."""
        return self.root / "disks"

    @property
    def downloads(self) -> Path:
        """Disks that are arriving by URL; what is here is gone on with, by a later daemon too."""
        return self.root / "downloads"

    @property
    def incoming(self) -> Path:
        """Pulls in progress; whatever is here when the daemon starts is half-made and goes."""
        return self.root / "incoming"

    @property
    def pods(self) -> Path:
        """Disks of pods, a directory each (persistent: the disk may be larger than /run)."""
        return self.root / "pods"

    @property
    def templates(self) -> Path:
        """Frozen guests, a directory each."""
        return self.root / "templates"

    @property
    def cni_cache(self) -> Path:
        """CNI results by sandbox and interface, for DEL."""
        return self.root / "cni"

    @property
    def sandboxes(self) -> Path:
        """Sockets, console and helper logs of running sandboxes, a directory each."""
        return self.run / "sandboxes"

    def share(self, sandbox_id: str) -> Path:
        """Return the directory that the VM of one sandbox sees; a mount of its own."""
        return self.run / "shares" / sandbox_id[:13]

    @property
    def netns(self) -> Path:
        """Bind mounts that hold the pods' network namespaces (the directory ip-netns(8) reads)."""
        return Path("/run/netns")

    def pod_netns(self, sandbox_id: str) -> Path:
        """Return where one sandbox's network namespace is mounted."""
        return self.netns / f"vmrt-{sandbox_id[:13]}"

    def pod_disks(self, sandbox_id: str) -> Path:
        """Return the directory of one sandbox's disks."""
        return self.pods / sandbox_id

    def sandbox(self, sandbox_id: str) -> Path:
        """Return the runtime directory of one sandbox.

        Unix socket paths are limited to 107 bytes (unix(7)), hence the short id.
        """
        return self.sandboxes / sandbox_id[:13]
