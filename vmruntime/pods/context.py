"""What the use cases share: records, resources, the running sandboxes, the locks that order calls."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from vmruntime.aio.tasks import Shared, TaskScope
from vmruntime.clock import Clock
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.errors import VmHeld
from vmruntime.model.sandbox import Sandbox, SandboxKind, SandboxSpec, SandboxState
from vmruntime.paths import Paths
from vmruntime.pods.log_pump import LogPump
from vmruntime.pods.oci.cdi import CdiSpecs
from vmruntime.pods.oci.hooks import Hook
from vmruntime.pods.ports import Images, Network, Spares
from vmruntime.pods.registry import Registry
from vmruntime.sandboxes.interface import RunningSandbox, SandboxBackend
from vmruntime.sandboxes.ledger import OwnedResources


class Locks:
    """A lock for each id in use; it is forgotten when nobody holds or awaits it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Hold the lock of one id."""
        let_go = await self.take(name)
        try:
            yield
        finally:
            let_go()

    async def take(self, name: str) -> Callable[[], None]:
        """Take the lock of one id; return what lets go of it, to be called once, by whoever is done with it."""
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            await lock.acquire()
        except BaseException:
            self._forget_user(name)
            raise

        def let_go() -> None:
            lock.release()
            self._forget_user(name)

        return let_go

    def _forget_user(self, name: str) -> None:
        lock, users = self._locks.pop(name)
        if users > 1:
            self._locks[name] = (lock, users - 1)


@dataclasses.dataclass
class Live:
    """A sandbox that runs now: its handle, the tasks that watch it, and its containers' log pumps by container id."""

    running: RunningSandbox
    scope: TaskScope
    pumps: dict[str, LogPump] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Where OCI hooks come from.

    Attributes:
        load: Reads them, in the order in which they are to run; it blocks.
        skip_in_vms: Leave out, rather than refuse a container for, hooks that only the host can run.
    """

    load: Callable[[], Sequence[Hook]] = tuple
    skip_in_vms: bool = False


@dataclasses.dataclass
class Context:
    """Everything a use case may touch.

    Attributes:
        load_cdi: Reads the CDI files of this host; it blocks.
        spares: What waits for container pods.
        live: Running sandboxes by id.
        held: Running sandboxes that could not be taken over yet, by id, and why.
        handover: Ids of sandboxes and containers whose creator went away before it was told of them.
    """

    registry: Registry
    owned: OwnedResources
    backends: dict[SandboxKind, SandboxBackend]
    network: Network
    images: Images
    clock: Clock
    new_id: Callable[[], str]
    paths: Paths
    load_profile: Callable[[str], bytes]
    load_cdi: Callable[[], CdiSpecs] = CdiSpecs
    spares: Spares | None = None
    hooks: Hooks = dataclasses.field(default_factory=Hooks)
    scope: TaskScope = dataclasses.field(default_factory=lambda: TaskScope("pods"))
    locks: Locks = dataclasses.field(default_factory=Locks)
    live: dict[str, Live] = dataclasses.field(default_factory=dict)
    held: dict[str, str] = dataclasses.field(default_factory=dict)
    handover: set[str] = dataclasses.field(default_factory=set)

    def id_for(self, spec: SandboxSpec) -> str:
        """Return the id of a new sandbox: that of a VM which waits for such a one, or any.

        Raises:
            InvalidArgument: This host could never hold it.
        """
        claimed = self.spares.claim(spec) if self.spares is not None and spec.kind is SandboxKind.CONTAINER else None
        return claimed or self.new_id()

    @property
    def shared(self) -> Shared:
        """Work that outlives the call that asked for it."""
        return Shared(self.scope)

    def backend(self, sandbox: Sandbox) -> SandboxBackend:
        """Return what runs a sandbox's kind.

        Raises:
            FailedPrecondition: Nothing does any more.
        """
        backend = self.backends.get(sandbox.spec.kind)
        if backend is None:
            raise FailedPrecondition(
                f"this daemon runs no pods of the kind {sandbox.spec.kind.value}",
                remedy="look in its log why it does not, or whether host_pods is never",
            )
        return backend

    def releaser(self, sandbox: Sandbox) -> SandboxBackend:
        """Return what releases a sandbox: any backend can, when its own is switched off, since the ledger has it all."""
        return self.backends.get(sandbox.spec.kind) or next(iter(self.backends.values()))

    def running(self, sandbox_id: str) -> Live:
        """Return a running sandbox.

        Raises:
            FailedPrecondition: It does not run.
            VmHeld: It does, and cannot be talked to yet.
        """
        live = self.live.get(sandbox_id)
        if live is None:
            sandbox = self.registry.sandbox(sandbox_id)
            if sandbox_id in self.held and sandbox.state is SandboxState.READY:
                raise VmHeld(self.held[sandbox_id])
            why = f": {sandbox.reason}" if sandbox.reason else ""
            raise FailedPrecondition(f"the sandbox {sandbox_id} is {sandbox.state.value}{why}")
        return live

    def log_position(self, container_id: str) -> Path:
        """Return where a container's log position is noted; it lasts as long as the host's boot, like the VM."""
        return self.paths.run / "logs" / container_id

    def hook_output(self, sandbox_id: str) -> Path:
        """Return the file in which a host pod's hooks leave what they write, until the pod is removed."""
        return self.paths.sandbox(sandbox_id) / "hooks.log"
