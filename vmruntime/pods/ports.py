"""What pods need from images and the network, so that use cases can be tested without either."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from vmruntime.model.image import DiskImage, Image, Layer
from vmruntime.model.sandbox import PodNetwork, Sandbox, SandboxSpec
from vmruntime.network.tap import SpareTap


class Tap(Protocol):
    """An open tap beside one CNI interface."""

    @property
    def fd(self) -> int:
        """The tap's descriptor."""

    def close(self) -> None:
        """Close the descriptor; a VM that got it keeps its own."""


class Network(Protocol):
    """Pod networks."""

    async def spare_tap(self) -> SpareTap:
        """Make a tap for a VM whose pod is not known, or has no network yet; nobody sees it, and the caller closes it.

        Raises:
            NetworkError: The kernel refuses.
        """

    async def add(self, sandbox: Sandbox, spare: SpareTap | None = None) -> tuple[PodNetwork, Sequence[Tap]]:
        """Make the pod's network namespace, run CNI ADD and make a tap beside each interface.

        Args:
            sandbox: The pod.
            spare: A new tap that the pod's VM has, to be that of its first interface, whose device_mac is the tap's then.
                It is of no use any more when this fails, and the caller's to close in any case. Only container pods use it.

        Returns:
            The network, and the taps, open: those but the spare one; none of an image pod's, which open_taps() opens for
            each of its VMs.
        """

    async def open_taps(self, sandbox: Sandbox) -> Sequence[Tap]:
        """Open the taps of an image pod, which stay when its VM ends; nobody may have them open.

        Raises:
            NetworkError: They are in use, or the pod's network is gone.
        """

    async def teardown(self, sandbox_id: str) -> None:
        """Run CNI DEL and remove the namespace; nothing left: success."""

    async def check(self, sandbox_id: str) -> bool:
        """Raise an error if a pod's network is not as it was made; return whether there was something to check."""

    async def collect(self, keep: Collection[str]) -> None:
        """Release the networks of all sandboxes but these; nothing may be added meanwhile."""


class Spares(Protocol):
    """VMs that are up before their pods are known, and NICs that are plugged in before CNI has answered."""

    def claim(self, spec: SandboxSpec) -> str | None:
        """Return the id that a new sandbox is to have, because a VM waits under it; None: any.

        Raises:
            InvalidArgument: This host could never hold it.
        """

    async def tap(self, sandbox_id: str) -> SpareTap | None:
        """Return the tap of the sandbox's first NIC, which start() of the backend plugs in; it is the caller's to close."""

    async def drop(self, sandbox_id: str) -> None:
        """Let go of what was kept for a sandbox that does not start; nothing: success."""


class Images(Protocol):
    """Images on this host."""

    def status(self, reference: str) -> Image | None:
        """Return an image by id, tag or digest."""

    def layer_path(self, layer: Layer) -> Path:
        """Return a layer's disk image."""

    async def vm_disk(self, image: Image) -> tuple[Path, DiskImage]:
        """Return the disk of an image and its file, taken out of a containerDisk's layer when that was not done yet.

        Raises:
            FailedPrecondition: It has none, or one that may not be given to a VM.
        """

    async def touch(self, image_ids: Iterable[str]) -> None:
        """Note that images are used now, or have been until now; unknown ones: success."""

    async def sweep(self) -> None:
        """Remove layers that nothing references."""
