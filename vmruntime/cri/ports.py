"""What the CRI services need besides pods: images and the runtime's condition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from vmruntime.model.image import Image, ImageUse, Pruned, RegistryAuth
from vmruntime.model.sandbox import SandboxKind
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec


class FsUsage(Protocol):
    """What images take on disk."""

    @property
    def mountpoint(self) -> Path:
        """Directory on the file system that holds the images."""

    @property
    def used_bytes(self) -> int:
        """Bytes the images use, not the whole file system."""

    @property
    def used_inodes(self) -> int:
        """Inodes the images use."""


class Images(Protocol):
    """The image service. Methods may raise any vmruntime.errors class."""

    async def pull(self, reference: str, auth: RegistryAuth | None, *, for_vm: bool = False) -> Image:
        """Bring an image here, or find that it is, and return it; with `for_vm` it has to have a disk that VMs boot."""

    async def vm_name(self, reference: str) -> str:
        """Return what an image pod means by a reference, which may be a VM image by URL."""

    def status(self, reference: str) -> Image | None:
        """Return the image that a name, digest reference or id stands for; None: not here."""

    def list(self) -> list[Image]:
        """Return every image here."""

    async def remove(self, reference: str) -> None:
        """Forget an image with all its names; one that is not here: success."""

    def uses(self) -> Sequence[ImageUse]:
        """Return every image here and whether a container has it."""

    async def prune(self, unused_seconds: float, *, dry_run: bool) -> Pruned:
        """Remove images that nobody has used for so long, but for pinned ones and those in use; or only find them."""

    def fs_usage(self) -> FsUsage:
        """Return what the images take on disk, from memory."""


class Machines(Protocol):
    """The machines of image pods.

    Every method raises NotFound for an unknown sandbox, and FailedPrecondition for one of another kind, or whose machine
    does not run.
    """

    async def pause(self, sandbox_id: str) -> None:
        """Hold a machine's processors; they are held already: success."""

    async def resume(self, sandbox_id: str) -> None:
        """Let a machine's processors go on; they do: success."""

    async def reset(self, sandbox_id: str) -> None:
        """Have a machine boot again, with no warning to its guest."""


class Streams(Protocol):
    """Where exec, attach and port-forward are served. Each URL works once and soon.

    Every method raises ResourceExhausted when too many URLs are waiting to be used.
    """

    def exec_url(self, spec: ExecSpec) -> str:
        """Return the absolute URL on which a command will run."""

    def attach_url(self, spec: AttachSpec) -> str:
        """Return the absolute URL of a container's streams."""

    def port_forward_url(self, spec: PortForwardSpec) -> str:
        """Return the absolute URL of a sandbox's ports."""


class NodeNetwork(Protocol):
    """The node's network."""

    async def use_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        """Take addresses of pods from these networks, at least one, where the network is vmruntime's to configure."""


class Conditions(Protocol):
    """How the runtime is."""

    async def runtime_ready(self) -> tuple[bool, str, str]:
        """Return whether VMs can be started, a CamelCase reason and a message; both empty when ready."""

    async def network_ready(self) -> tuple[bool, str, str]:
        """Return whether pods can get an address, a CamelCase reason and a message; both empty when ready."""

    def user_namespaces(self, kind: SandboxKind) -> bool:
        """Return whether pods of a kind can have user namespaces."""

    def info(self) -> dict[str, str]:
        """Return facts for `crictl info`, each value JSON."""
