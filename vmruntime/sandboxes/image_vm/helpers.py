"""What serves a machine beside its VM: a TPM, a DHCP server, and whoever hears that the guest is up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import structlog

from vmruntime import tracing
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.pipeline import in_thread
from vmruntime.config.settings import Settings
from vmruntime.errors import FailedPrecondition, VmruntimeError
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.helpers import make_helper_directory
from vmruntime.hypervisor.interface import Recorder, VmHandle
from vmruntime.hypervisor.vsock import tail_of
from vmruntime.model.sandbox import Sandbox
from vmruntime.network.dhcp import start_dhcp
from vmruntime.qga.channel import Channel
from vmruntime.qga.client import GuestAgent
from vmruntime.sandboxes.image_vm.boot import Extras, image_pod
from vmruntime.sandboxes.image_vm.notify import BootNotices, notify_credential
from vmruntime.sandboxes.image_vm.prepare import Account

log = structlog.get_logger(__name__)

TPM_SECONDS = 10.0
POLL = 0.01


class Helpers:
    """The helpers of one machine. Their processes are in the ledger, and end with it."""

    def __init__(
        self,
        sandbox: Sandbox,
        settings: Settings,
        record: Recorder,
        directory: Path,
        disks: Path,
        on_ready: Callable[[], None],
    ) -> None:
        """Start nothing yet.

        Args:
            sandbox: The pod.
            settings: The daemon's.
            record: Told of each process before it runs.
            directory: The machine's runtime directory.
            disks: The pod's directory of disks.
            on_ready: Called when the guest says that it is up, as often as it says so.
        """
        self._sandbox = sandbox
        self._settings = settings
        self._record = record
        self._directory = directory
        self._disks = disks
        self._on_ready = on_ready
        self._notices: BootNotices | None = None

    @tracing.timed("vm.helpers")
    async def before(self, account: Account, cid: int) -> Extras:
        """Start what has to be there before the VM, and return what the machine is to have for it.

        Raises:
            FailedPrecondition: This host cannot give it a TPM.
        """
        tpm = await self._start_tpm(account) if image_pod(self._sandbox).tpm else None
        return Extras(oem_strings=[notify_credential(cid)], tpm=tpm)

    @tracing.timed("vm.helpers")
    async def beside(self, handle: VmHandle) -> None:
        """Start what serves the guest, which does not run yet.

        Raises:
            FailedPrecondition: It is to have its addresses by DHCP alone, and this host has no server.
        """
        try:
            await self._start_dhcp()
        except FailedPrecondition as error:
            if image_pod(self._sandbox).force_dhcp:
                raise
            log.warning("guest gets no address by DHCP", sandbox=self._sandbox.id, error=str(error))
        await self.listen(handle)

    async def listen(self, handle: VmHandle) -> None:
        """Listen for the guest's word that it is up; a guest that has said it before is not asked again."""
        await self.stop()
        notices = BootNotices(handle, self._heard)
        try:
            await notices.open()
        except FailedPrecondition as error:
            log.warning("nobody hears whether the guest is up", sandbox=self._sandbox.id, error=str(error))
        else:
            self._notices = notices

    async def stop(self) -> None:
        """Listen no more."""
        if self._notices is not None:
            await self._notices.close()
            self._notices = None

    async def ask_to_shut_down(self) -> None:
        """Ask the guest agent, for kernels that do not heed a power button."""
        with contextlib.suppress(VmruntimeError):
            agent = GuestAgent(await Channel.connect(self._directory / "qga.sock"))
            try:
                await agent.shutdown()
            finally:
                await agent.close()

    async def _start_dhcp(self) -> None:
        network, spec = self._sandbox.network, self._sandbox.spec
        if network is None or not network.interfaces:
            return
        await start_dhcp(
            network,
            spec.dns,
            spec.hostname or spec.metadata.name[:63],
            self._directory,
            self._record,
            self._settings.hypervisor.user,
        )

    def _heard(self, notice: dict[str, str]) -> None:
        if notice.get("READY") == "1":
            self._on_ready()

    async def _start_tpm(self, account: Account) -> Path:
        """Start swtpm; what it keeps stays with the pod's disk."""
        if shutil.which("swtpm") is None:
            raise FailedPrecondition(
                "annotation vmruntime.io/tpm: true, but this host has no program for it", remedy="install swtpm"
            )
        state = self._disks / "tpm"
        await in_thread(lambda: _owned_directory(state, account))
        # Beside the state it could be too long for a socket's address: the ids of pods are.
        control = await in_thread(lambda: make_helper_directory(self._directory, account.name)) / "tpm.sock"
        await in_thread(lambda: control.unlink(missing_ok=True))

        async def record(identity: ProcessIdentity) -> None:
            await self._record("tpm", identity)

        process = await DetachedProcess.spawn(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state},mode=0600"),
                *("--ctrl", f"type=unixio,path={control},mode=0600", "--terminate"),
            ],
            record=record,
            log=self._directory / "tpm.log",
            user=account.name,
        )
        deadline = asyncio.get_running_loop().time() + TPM_SECONDS
        while not control.is_socket():
            if not process.alive or asyncio.get_running_loop().time() > deadline:
                raise HypervisorError(f"the TPM did not start: {tail_of(self._directory / 'tpm.log')}")
            await asyncio.sleep(POLL)
        return control


def _owned_directory(path: Path, account: Account) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    os.chown(path, account.uid, account.gid)
