"""The machine of an image pod: started when its container is, ended, and found again after a restart of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import msgspec
import structlog

from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import GuestContainerState, GuestPhase
from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import Code, VmruntimeError
from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.interface import Nic, VirtualMachine, VmEnd, VmSpec
from vmruntime.model.ledger import ResourceKind
from vmruntime.model.resources import VmSize
from vmruntime.model.sandbox import Sandbox
from vmruntime.sandboxes.image_vm import definition as definitions
from vmruntime.sandboxes.image_vm.boot import firmware_boot
from vmruntime.sandboxes.image_vm.console_log import ConsoleOutput
from vmruntime.sandboxes.image_vm.definition import Definition, MachineExit
from vmruntime.sandboxes.image_vm.handle import claim_uuid, machine_handle
from vmruntime.sandboxes.image_vm.helpers import Helpers
from vmruntime.sandboxes.image_vm.parts import MachineParts
from vmruntime.sandboxes.image_vm.prepare import Account
from vmruntime.sandboxes.placement import recorder
from vmruntime.sandboxes.vm_volumes import SHARE_ROLE, VmVolumes
from vmruntime.volumes.share import withdraw

log = structlog.get_logger(__name__)

PRESS_SECONDS = 5.0
"""How often the power button is pressed while a guest is to shut down, as Virtlet did."""

EXIT_CODES = {VmEnd.POWEROFF: 0, VmEnd.CRASH: 1, VmEnd.KILLED: 128 + signal.SIGKILL, VmEnd.LOST: 255}
VM_ROLES = frozenset({"qemu", "vsock", SHARE_ROLE, "dhcp", "tpm"})


class ImageMachine:
    """The machine of one pod; there is at most one, which a container is."""

    def __init__(self, sandbox: Sandbox, parts: MachineParts) -> None:
        self.sandbox = sandbox
        self.directory = parts.paths.sandbox(sandbox.id)
        self.disks = parts.paths.pod_disks(sandbox.id)
        self._parts = parts
        record = recorder(parts.owned, sandbox.id)
        self._helpers = Helpers(sandbox, parts.settings, record, self.directory, self.disks, self._guest_is_up)
        self._definition: Definition | None = None
        self._console: ConsoleOutput | None = None
        self._vm: VirtualMachine | None = None
        self._volumes: VmVolumes | None = None
        self._scope = TaskScope(f"machine {sandbox.id[:13]}")
        self._stopping: asyncio.Task[None] | None = None
        self._killed_on_request = False
        self._changing = asyncio.Lock()
        self._listeners: list[asyncio.Queue[GuestContainerState]] = []
        self.ended = asyncio.Event()
        self.ended.set()

    @property
    def definition(self) -> Definition | None:
        """What the machine is made of; None: no container was made."""
        return self._definition

    @property
    def vm(self) -> VirtualMachine | None:
        """The VM while it runs."""
        return self._vm

    @property
    def guest_ready(self) -> bool:
        """Whether the guest has said that it is up; guests that cannot never do."""
        return self._definition is not None and self._definition.guest_ready

    @property
    def parts(self) -> MachineParts:
        """What it is made with."""
        return self._parts

    def console(self, container_id: str) -> ConsoleOutput:
        """Return what the container's machine writes to its serial console.

        Raises:
            AgentError: There is no such container.
        """
        self._known(container_id)
        assert self._console is not None
        return self._console

    def running(self, container_id: str) -> VirtualMachine:
        """Return the VM that a container is.

        Raises:
            AgentError: There is no such container, or its machine does not run.
        """
        self._known(container_id)
        if self._vm is None:
            raise AgentError("the pod's VM does not run", Code.FAILED_PRECONDITION)
        return self._vm

    async def define(self, definition: Definition) -> None:
        """Write down what the machine is made of; one that has not run, or has ended, is replaced."""
        async with self._changing:
            if self._vm is not None:
                raise AgentError("the pod's VM runs already; an image pod has one container", Code.FAILED_PRECONDITION)
            await self._save(definition)
            self._console = self._output(definition)

    async def forget(self, container_id: str) -> None:
        """End the machine and forget its definition; another container's, or none: success."""
        if self._definition is None or self._definition.container_id != container_id:
            return
        await self.kill()
        async with self._changing:
            if self._console is not None:
                await self._console.end()
                await self._console.forget()
            await in_thread(lambda: definitions.forget(self.disks))
            self._definition = self._console = None
            await self._release_machine()

    async def start(self, container_id: str) -> int:
        """Start the machine and return when, in nanoseconds since the epoch; it runs already: when it was started.

        Raises:
            AgentError: It cannot be started; what was begun is undone.
        """
        async with self._changing:
            defined = self._known(container_id)
            if defined.ended is not None:
                raise AgentError(f"the VM has ended: {defined.ended.message}", Code.FAILED_PRECONDITION)
            if self._vm is not None:
                return defined.started_at
            try:
                await self._save(msgspec.structs.replace(defined, started_at=self._parts.clock.now_ns()))
                vm = await self._boot(defined)
            except (VmruntimeError, OSError) as error:
                log.warning("machine not started", sandbox=self.sandbox.id, error=str(error))
                self._definition = defined
                await self._note_end(EXIT_CODES[VmEnd.LOST], f"the VM could not be started: {error}")
                raise AgentError(str(error), Code.FAILED_PRECONDITION) from error
            except BaseException:
                with contextlib.suppress(OSError):  # the next daemon undoes it, too
                    await asyncio.shield(self._save(defined))
                self._definition = defined
                raise
            self._runs(vm)
            return self._known(container_id).started_at

    async def adopt(self) -> None:
        """Find out what became of the machine while no daemon ran."""
        self._definition = defined = await in_thread(lambda: definitions.load(self.disks))
        self._console = self._output(defined) if defined is not None else None
        if defined is None or defined.ended is not None or not defined.booted:
            await self._undo_start(defined)
            return
        try:
            handle = await machine_handle(self.sandbox, self.directory, self._parts.owned.ledger, self._parts.driver)
            if handle.driver not in self._parts.hypervisors:
                raise VmGone(f"the driver {handle.driver}, which it runs under, cannot be used any more")
            vm = await self._parts.hypervisors[handle.driver].adopt(handle)
        except (VmGone, HypervisorError) as error:
            await self._release_helpers()
            await self._note_end(EXIT_CODES[VmEnd.LOST], f"the VM ended while no daemon was running: {error.message}")
        else:
            await self._helpers.listen(vm.handle)
            self._runs(vm)

    async def signal(self, container_id: str, signum: int) -> None:
        """Have the guest shut down, or, with SIGKILL, end it at once."""
        self._known(container_id)
        if signum == signal.SIGKILL:
            await self.kill()
        elif self._vm is not None and self._stopping is None:
            self._stopping = self._scope.start(self._keep_pressing(self._vm), "power button")

    async def kill(self) -> None:
        """End the machine at once and wait until that is written down; it does not run: success."""
        async with self._changing:
            vm = self._vm
            if vm is None:
                await self._note_end(EXIT_CODES[VmEnd.KILLED], "the VM was never started")
                return
            await vm.kill()
            self._killed_on_request = True  # nobody looks before the lock is free
        await self.ended.wait()

    async def shut_down(self, grace: float) -> None:
        """Have the guest shut down within some seconds, then end it."""
        if self._vm is not None and self._definition is not None:
            await self.signal(self._definition.container_id, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self.ended.wait()
        await self.kill()

    async def resize(self, size: VmSize) -> None:
        """Make the machine so large, now or when it is started."""
        async with self._changing:
            if self._vm is not None:
                await self._vm.resize(size)
            if self._definition is not None and self._definition.ended is None:
                await self._save(msgspec.structs.replace(self._definition, size=size))

    def state(self) -> GuestContainerState | None:
        """Return the container's state as an agent would tell it; None: there is none."""
        defined = self._definition
        if defined is None:
            return None
        ended = defined.ended
        phase = GuestPhase.EXITED if ended else GuestPhase.RUNNING if self._vm is not None else GuestPhase.CREATED
        return GuestContainerState(
            id=defined.container_id,
            phase=phase,
            pid=0,
            started_at=defined.started_at,
            exited_at=ended.time if ended else 0,
            exit_code=ended.code if ended else 0,
            oom_killed=False,
            message=ended.message if ended else "",
        )

    async def events(self) -> AsyncIterator[GuestContainerState]:
        """Iterate over the container's state, then over its changes."""
        queue: asyncio.Queue[GuestContainerState] = asyncio.Queue()
        self._listeners.append(queue)
        try:
            if (state := self.state()) is not None:
                yield state
            while True:
                yield await queue.get()
        finally:
            self._listeners.remove(queue)

    async def close(self) -> None:
        """Let go of the machine; it goes on."""
        await self._helpers.stop()
        await self._scope.close()
        if self._vm is not None:
            await self._vm.close()

    async def withdraw_volumes(self, container_id: str) -> None:
        """Take away a container's volumes from the share, which stays when its machine ends."""
        await withdraw(self._parts.paths.share(self.sandbox.id), container_id)

    def _known(self, container_id: str) -> Definition:
        if self._definition is None or self._definition.container_id != container_id:
            raise AgentError(f"the pod has no container {container_id[:13]}", Code.NOT_FOUND)
        return self._definition

    def _output(self, definition: Definition) -> ConsoleOutput:
        parts = self._parts
        return ConsoleOutput(self.directory, parts.changes, parts.clock, start=definition.console_start)

    async def _save(self, definition: Definition) -> None:
        await in_thread(lambda: definitions.save(self.disks, definition))
        self._definition = definition

    async def _boot(self, defined: Definition) -> VirtualMachine:
        """Start the VM, give it what is plugged in, and let the guest run; on failure nothing stays."""
        parts, sandbox = self._parts, self.sandbox
        await self._release_helpers()
        record = recorder(parts.owned, sandbox.id)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._release_helpers)
            undo.push_async_callback(self._release_machine)
            await claim_uuid(sandbox, parts.owned.ledger, parts.driver)
            account = Account.of(parts.settings.hypervisor.user)
            cid = await parts.owned.ledger.allocate_cid(sandbox.id)
            extras = await self._helpers.before(account, cid)
            spec = VmSpec(
                id=sandbox.id,
                size=defined.size,
                boot=await firmware_boot(sandbox, self.disks, (account.uid, account.gid), extras),
                directory=self.directory,
                cid=cid,
                disks=[disk.disk() for disk in defined.disks],
            )
            vm = await parts.hypervisors[parts.driver].start(spec, record)
            undo.push_async_callback(vm.kill)
            await self._plug_in(vm, defined)
            await self._helpers.beside(vm.handle)
            await vm.resume()
            await self._save(msgspec.structs.replace(self._known(defined.container_id), booted=True))
            undo.pop_all()
        return vm

    async def _plug_in(self, vm: VirtualMachine, defined: Definition) -> None:
        network = self.sandbox.network
        taps = await self._parts.open_taps(self.sandbox) if network is not None else []
        try:
            for nic, tap in zip(network.interfaces if network else [], taps, strict=True):
                await vm.attach_nic(Nic(id=nic.name, mac=nic.mac), tap.fd)
        finally:
            for tap in taps:
                tap.close()
        self._volumes = self._share(vm)
        if defined.mounts:
            await self._volumes.publish(defined.container_id, defined.mounts)

    def _share(self, vm: VirtualMachine) -> VmVolumes:
        parts, sandbox = self._parts, self.sandbox
        root, program = parts.paths.share(sandbox.id), parts.settings.volumes.virtiofsd
        return VmVolumes(sandbox, vm, parts.owned, root, program, recorder(parts.owned, sandbox.id))

    def _runs(self, vm: VirtualMachine) -> None:
        self._vm = vm
        self._killed_on_request = False
        self._volumes = self._volumes or self._share(vm)
        self.ended.clear()
        self._scope.start(self._watch(vm), "end")
        if self._console is not None:
            self._scope.start(self._console.guard(), "console")
        self._tell()

    async def _watch(self, vm: VirtualMachine) -> None:
        """Write down how the machine ended; its helpers have no use any more then."""
        reason = await vm.wait()
        async with self._changing:
            if self._stopping is not None:
                self._stopping.cancel()
                self._stopping = None
            # A guest may have ended by itself at the last moment.
            killed = self._killed_on_request and vm.end not in (VmEnd.POWEROFF, VmEnd.CRASH)
            message = "the VM was ended: it did not shut down in time" if killed else reason
            code = EXIT_CODES[VmEnd.KILLED if killed else vm.end]
            # Written down first: until then a daemon that comes after this one can learn it from the hypervisor.
            self._vm = self._volumes = None
            await self._note_end(code, message)
            for clean_up in (vm.kill, self._release_helpers):
                try:
                    await clean_up()
                except VmruntimeError as error:  # in the ledger all the same
                    log.error("clean-up left something behind", sandbox=self.sandbox.id, error=str(error))

    async def _note_end(self, code: int, message: str) -> None:
        if self._definition is not None and self._definition.ended is None:
            ended = MachineExit(code=code, message=message, time=self._parts.clock.now_ns())
            found = msgspec.structs.replace(self._definition, ended=ended)
            try:
                await self._save(found)
            except OSError as error:  # a later daemon sees for itself that the machine has ended
                log.error("machine's end not written down", sandbox=self.sandbox.id, error=str(error))
                self._definition = found
            try:
                if self._console is not None:
                    await self._console.end()
            except AgentError as error:
                log.error("console's end not written down", sandbox=self.sandbox.id, error=str(error))
            log.info("machine ended", sandbox=self.sandbox.id, exit_code=code, reason=message)
        self.ended.set()
        self._tell()

    def _tell(self) -> None:
        if (state := self.state()) is not None:
            for queue in self._listeners:
                queue.put_nowait(state)

    async def _keep_pressing(self, vm: VirtualMachine) -> None:
        """Press the power button until the guest is off: one that boots, or is busy, may not notice the first time."""
        pressed = 0
        while True:
            try:
                if not pressed:
                    await vm.resume()  # a guest that somebody has paused sees no button
                await vm.press_power_button()
            except VmruntimeError as error:
                log.warning("power button not pressed", sandbox=self.sandbox.id, error=str(error))
            pressed += 1
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(PRESS_SECONDS))
                if pressed > 1:  # its kernel may know no ACPI; many guests have no agent either, and nobody answers
                    group.create_task(self._ask_to_shut_down())

    async def _ask_to_shut_down(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PRESS_SECONDS):
                await self._helpers.ask_to_shut_down()

    async def _release_helpers(self) -> None:
        await self._helpers.stop()
        await self._parts.owned.release(
            self.sandbox.id,
            only=lambda one: (
                one.kind is ResourceKind.CID or (one.kind is ResourceKind.PROCESS and one.data["role"] in VM_ROLES)
            ),
        )

    async def _release_machine(self) -> None:
        await self._parts.owned.release(self.sandbox.id, only=lambda one: one.kind is ResourceKind.MACHINE)

    async def _undo_start(self, defined: Definition | None) -> None:
        """Take away what a daemon that was killed meanwhile began to start, or left of a machine that had ended."""
        await self._release_helpers()
        if defined is not None and defined.ended is None and defined.started_at:
            await self._release_machine()
            await self._save(msgspec.structs.replace(defined, started_at=0))

    def _guest_is_up(self) -> None:
        self._scope.start(self._note_guest_is_up(), "guest is up")

    async def _note_guest_is_up(self) -> None:
        async with self._changing:
            if self._vm is not None and self._definition is not None and not self._definition.guest_ready:
                await self._save(msgspec.structs.replace(self._definition, guest_ready=True))
                log.info("guest is up", sandbox=self.sandbox.id)
