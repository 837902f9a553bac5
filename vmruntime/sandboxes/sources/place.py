"""What a VM needs on the host before it starts: directories, a CID, a writable disk."""

from __future__ import annotations

import msgspec

from vmruntime.config.settings import Settings
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.interface import Disk, KernelBoot, Nic, PluggedNic, VmSpec
from vmruntime.model.resources import VmSize
from vmruntime.network.tap import SPARE_MAC
from vmruntime.paths import Paths
from vmruntime.sandboxes import scratch
from vmruntime.sandboxes.ledger import OwnedResources

FIRST_NIC = Nic(id="first", mac=SPARE_MAC)
"""What a VM has before its pod's network is known."""

SCRATCH_ARGUMENT = "vmruntime.scratch"
"""On the kernel's command line: the disk that the agent mounts before it says that it is ready (guest-agent/src/init/cmdline.rs)."""


def plugged_nic(tap_fd: int | None) -> PluggedNic | None:
    """Return the first NIC as a VM has it from its start, on an open tap; None: it is plugged in later."""
    return None if tap_fd is None else PluggedNic(nic=FIRST_NIC, tap_fd=tap_fd)


class Place:
    """Makes the places of VMs; all of it is in the ledger."""

    def __init__(self, owned: OwnedResources, paths: Paths, settings: Settings) -> None:
        self.owned = owned
        self._paths = paths
        self._settings = settings

    def boot(self) -> KernelBoot:
        """Return the guest that VMs boot.

        Raises:
            FailedPrecondition: There is none.
        """
        guest = self._settings.guest_directory
        kernel, initramfs = guest / "vmlinuz", guest / "initramfs.img"
        for file in (kernel, initramfs):
            if not file.is_file():
                raise FailedPrecondition(f"there is no guest to boot: {file} is missing", remedy="make guest")
        return KernelBoot(kernel=kernel, initramfs=initramfs, arguments=self._settings.guest.kernel_args)

    def template(self, owner: str, size: VmSize, tap_fd: int | None) -> VmSpec:
        """Describe the VM that becomes a template: it has all that every pod's VM has, but a vsock; nothing is made."""
        boot = self.boot()
        boot = msgspec.structs.replace(boot, arguments=f"{boot.arguments} {SCRATCH_ARGUMENT}={scratch.SERIAL}".strip())
        return msgspec.structs.replace(self._described(owner, size, boot, cid=0), nic=plugged_nic(tap_fd))

    def _described(self, owner: str, size: VmSize, boot: KernelBoot, *, cid: int) -> VmSpec:
        return VmSpec(
            id=owner,
            size=size,
            boot=boot,
            directory=self._paths.sandbox(owner),
            cid=cid,
            disks=[self._scratch(owner)],
        )

    def _scratch(self, owner: str) -> Disk:
        return Disk(path=self._paths.pod_disks(owner) / "scratch.img", serial=scratch.SERIAL, readonly=False)

    @property
    def scratch_gib(self) -> int:
        """Size of the writable disk."""
        return self._settings.guest.scratch_gib

    async def make(self, owner: str, cgroup: str, *, low: bool = False, like: int | None = None) -> None:
        """Make what a VM needs but a CID.

        Args:
            owner: In the ledger.
            cgroup: Where it is to run.
            low: It has the processors only when nobody else wants them.
            like: A file of which the writable disk is to be a copy; None: a new one.

        Raises:
            ResourceExhausted: The host's disk is nearly full.
        """
        await self.owned.cgroup(owner, cgroup)
        if low:
            await self.owned.cgroups.set_low(cgroup, low=True)
        await self.owned.directory(owner, self._paths.sandbox(owner), 0o711, until_removed=True)
        await self.owned.directory(owner, self._paths.pod_disks(owner))
        path = self._scratch(owner).path
        if like is None:
            await scratch.make_scratch(path, self.scratch_gib)
        else:
            await scratch.copy_scratch(path, self.scratch_gib, like)

    async def pod(self, owner: str, size: VmSize) -> VmSpec:
        """Describe a pod's VM, with a CID that nobody else has."""
        return self._described(owner, size, self.boot(), cid=await self.owned.ledger.allocate_cid(owner))
