"""What a VM needs on the host before it starts: directories, a CID, a writable disk."""

from __future__ import annotations

from vmruntime.config.settings import Settings
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.interface import Disk, KernelBoot, VmSpec
from vmruntime.model.resources import VmSize
from vmruntime.paths import Paths
from vmruntime.sandboxes import scratch
from vmruntime.sandboxes.ledger import OwnedResources


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

    def bare(self, owner: str, size: VmSize) -> VmSpec:
        """Return a VM with nothing plugged in; nothing is made."""
        return VmSpec(id=owner, size=size, boot=self.boot(), directory=self._paths.sandbox(owner), cid=0)

    async def make_bare(self, owner: str, size: VmSize, cgroup: str, *, low: bool = False) -> VmSpec:
        """Make what a VM with nothing plugged in needs, and describe the VM.

        Args:
            owner: In the ledger.
            size: Of the VM.
            cgroup: Where it is to run.
            low: It has the processors only when nobody else wants them.
        """
        spec = self.bare(owner, size)
        await self.owned.cgroup(owner, cgroup)
        if low:
            await self.owned.cgroups.set_low(cgroup, low=True)
        await self.owned.directory(owner, spec.directory, 0o711, until_removed=True)
        return spec

    async def make(self, owner: str, size: VmSize, cgroup: str, *, low: bool = False) -> VmSpec:
        """Make what a pod's VM needs, and describe the VM; see make_bare()."""
        spec = await self.make_bare(owner, size, cgroup, low=low)
        disks = self._paths.pod_disks(owner)
        await self.owned.directory(owner, disks)
        path = disks / "scratch.img"
        await scratch.make_scratch(path, self._settings.guest.scratch_gib)
        return VmSpec(
            id=owner,
            size=size,
            boot=spec.boot,
            directory=spec.directory,
            cid=await self.owned.ledger.allocate_cid(owner),
            disks=[Disk(path=path, serial=scratch.SERIAL, readonly=False)],
        )
