"""The inside of a VM in memory: the containers of one guest, with the real agent's states and refusals."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.fake_container import FakeContainer, News
from vmruntime.agent.fake_programs import PROGRAMS, Process, Program, find
from vmruntime.agent.fake_streams import Attach, Echo, Exec, missing
from vmruntime.agent.interface import GuestContainer, GuestContainerState, GuestPhase, GuestSetup, PidMode
from vmruntime.aio.faults import Faults
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import Code
from vmruntime.model.container import ContainerUser
from vmruntime.model.stats import ContainerUsage, GuestUsage
from vmruntime.model.streams import AttachSpec, ExecEnd, ExecSpec

T = TypeVar("T")

ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
ACCOUNTS = {"root": (0, 0, []), "web": (1001, 1002, [1003])}
SIGTERM, SIGKILL, LAST_SIGNAL = 15, 9, 64


class FakeGuest:
    """The inside of a VM.

    Attributes:
        programs: What containers can run, by name.
        disks: Returns the serials of the disks the guest sees; None: any layer is there.
        setup: What made it a sandbox; None before.
        echo_ports: TCP ports on which something listens and sends back what it gets.
        cpus: How many processors it was told to use.
        on_power_off: Called when the guest turns itself off.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        disks: Callable[[], set[str]] | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.faults = faults or Faults()
        self.programs: dict[str, Program] = dict(PROGRAMS)
        self.disks = disks
        self.now_ns = now_ns
        self.containers: dict[str, FakeContainer] = {}
        self.setup: GuestSetup | None = None
        self.echo_ports: set[int] = set()
        self.cpus = 1
        self.on_power_off: Callable[[], None] = lambda: None
        self.alive = True
        self.died = asyncio.Event()
        self.changes: list[GuestContainerState] = []
        self.news = News()
        self._created = 0
        self._scope = TaskScope("fake guest")

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a call to its end even if the caller goes away, as the real agent does; the guest's death breaks it off.

        Raises:
            AgentGone: The guest died meanwhile.
        """
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def carry() -> None:
            try:
                result = await work
            except asyncio.CancelledError:
                if not outcome.done():
                    outcome.set_exception(gone())
                    outcome.exception()
                raise
            except BaseException as error:
                if not outcome.done():
                    outcome.set_exception(error)
                    outcome.exception()
            else:
                if not outcome.done():
                    outcome.set_result(result)

        if not self.alive:
            work.close()
            raise gone()
        self._scope.start(carry(), "call")
        return await asyncio.shield(outcome)

    def start_task(self, work: Awaitable[None], name: str) -> None:
        """Run something for as long as the guest lives."""

        async def carry() -> None:
            await work

        self._scope.start(carry(), name)

    async def die(self) -> None:
        """End at once, like a VM that is killed: calls under way fail, streams break."""
        self.alive = False
        self.died.set()
        self.news.tell()
        await self._scope.close()

    def publish(self, state: GuestContainerState) -> None:
        """Tell the listeners of a change."""
        self.changes.append(state)
        self.news.tell()

    def container(self, container_id: str) -> FakeContainer:
        """Return a container, or raise the agent's NOT_FOUND."""
        found = self.containers.get(container_id)
        if found is None:
            raise AgentError(f'no container "{container_id}"', Code.NOT_FOUND)
        return found

    def prepare(self, scratch_serial: str) -> None:
        """Prepare."""
        if self.setup is not None:
            raise AgentError(f'this agent serves sandbox "{self.setup.sandbox_id}" already', Code.FAILED_PRECONDITION)
        self._check_disk(scratch_serial)

    def set_up(self, setup: GuestSetup) -> None:
        """SetupSandbox."""
        _check_id("sandbox id", setup.sandbox_id)
        if self.setup is not None and self.setup.sandbox_id != setup.sandbox_id:
            raise AgentError(f'this agent serves sandbox "{self.setup.sandbox_id}" already', Code.FAILED_PRECONDITION)
        self._check_disk(setup.scratch_serial)
        self.setup = self.setup or setup

    def _check_disk(self, serial: str) -> None:
        if self.disks is not None and serial and serial not in self.disks():
            raise AgentError(f'disk "{serial}" did not appear', Code.DEADLINE_EXCEEDED)

    def create(self, request: GuestContainer) -> tuple[int, ContainerUser]:
        """CreateContainer; nothing stays when it refuses."""
        _check_id("container id", request.id)
        if self.setup is None:
            raise AgentError("the sandbox is not set up", Code.FAILED_PRECONDITION)
        if request.id in self.containers:
            raise AgentError(f'container "{request.id}" exists', Code.ALREADY_EXISTS)
        self._check_pid_mode(request)
        self._check_layers(request)
        argv = msgspec.json.decode(request.oci_spec)["process"]["args"]
        user = _resolve(request)
        program = self._find(argv[0])
        self._created += 1
        process = Process(argv=argv, sink=_Nowhere(), uid=user.uid, hostname=self.setup.hostname)
        container = FakeContainer(request, program, process, self._created, self.now_ns, self.publish)
        self.containers[request.id] = container
        self.publish(container.state)
        return container.state.pid, user

    def start(self, container_id: str) -> int:
        """StartContainer."""
        container = self.container(container_id)
        _require(container, GuestPhase.CREATED)
        return container.start(lambda work: self.start_task(work, container_id))

    def signal(self, container_id: str, signal: int) -> None:
        """SignalContainer."""
        if not 1 <= signal <= LAST_SIGNAL:
            raise AgentError(f"signal {signal} is not between 1 and {LAST_SIGNAL}", Code.INVALID_ARGUMENT)
        self.container(container_id).signal(signal)

    def delete(self, container_id: str) -> list[str]:
        """DeleteContainer: the serials that no container uses any more."""
        container = self.containers.get(container_id)
        if container is None:
            return []
        container.exit(128 + SIGKILL)
        container.output.close()
        del self.containers[container_id]
        used = {serial for other in self.containers.values() for serial in _serials(other.request)}
        return [serial for serial in dict.fromkeys(_serials(container.request)) if serial not in used]

    def exec(self, spec: ExecSpec) -> Exec:
        """Exec: a command that runs when its output is read; what is wrong with it is told there."""

        def find_both() -> tuple[FakeContainer, Program | ExecEnd]:
            if not spec.argv:
                raise AgentError("nothing to run: args is empty", Code.INVALID_ARGUMENT)
            container = self.container(spec.container_id)
            _require(container, GuestPhase.RUNNING)
            try:
                return container, self._find(spec.argv[0])
            except AgentError as error:
                return container, missing(error)

        return Exec(spec, find_both)

    def attach(self, spec: AttachSpec) -> Attach:
        """Attach."""

        def find_container() -> FakeContainer:
            container = self.container(spec.container_id)
            if container.phase is GuestPhase.EXITED:
                raise AgentError(f'container "{spec.container_id}" is exited', Code.FAILED_PRECONDITION)
            return container

        return Attach(spec, find_container)

    def connect(self, port: int) -> Echo:
        """PortForward."""
        if port not in self.echo_ports:
            raise AgentError(f"port {port}: connection refused", Code.FAILED_PRECONDITION)
        return Echo()

    def update(self, container_id: str, resources: bytes) -> None:
        """UpdateContainer."""
        container = self.container(container_id)
        if container.phase is GuestPhase.EXITED:
            raise AgentError(f'container "{container_id}" is exited', Code.FAILED_PRECONDITION)
        container.resources.append(resources)

    def usage(self, container_ids: list[str]) -> GuestUsage:
        """Stats; no ids: all. Those it does not know are left out."""
        known = self.containers
        wanted = [known[one] for one in container_ids if one in known] if container_ids else list(known.values())
        now = self.now_ns()
        containers = [
            ContainerUsage(id=one.request.id, time=now, cpu_ns=1_000_000, memory_usage=4096, memory_working_set=4096)
            for one in wanted
        ]
        return GuestUsage(time=now, containers=containers, memory_total=512 << 20, memory_available=256 << 20)

    async def power_off(self, grace: float) -> None:
        """Stop every container and turn the machine off."""
        containers = list(self.containers.values())
        for container in containers:
            container.signal(SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                for container in containers:
                    if container.phase is not GuestPhase.EXITED:
                        await container.wait_ended()
        for container in containers:
            container.exit(128 + SIGKILL)
        self.on_power_off()

    def _find(self, name: str) -> Program:
        program = find(self.programs, name)
        if program is None:
            raise AgentError(f'exec: "{name}": executable file not found in $PATH', Code.INVALID_ARGUMENT)
        return program

    def _check_pid_mode(self, request: GuestContainer) -> None:
        if request.pid_mode is PidMode.POD and self.setup is not None and not self.setup.shared_pid_namespace:
            raise AgentError("the sandbox was set up without a shared PID namespace", Code.FAILED_PRECONDITION)
        if request.pid_mode is PidMode.TARGET and self.container(request.pid_target).phase is GuestPhase.EXITED:
            raise AgentError(
                f'container "{request.pid_target}", whose PID namespace is wanted, has exited', Code.FAILED_PRECONDITION
            )

    def _check_layers(self, request: GuestContainer) -> None:
        own = request.layer_serials
        for number, serial in enumerate(own):
            if serial in own[:number]:
                raise AgentError(f'layer "{serial}" is named twice', Code.INVALID_ARGUMENT)
        for serial in _serials(request):
            if self.disks is not None and serial not in self.disks():
                raise AgentError(f'disk "{serial}" did not appear', Code.DEADLINE_EXCEEDED)


def _serials(request: GuestContainer) -> list[str]:
    """Return the layers of the root file system and of image volumes."""
    return [*request.layer_serials, *(serial for volume in request.image_volumes for serial in volume)]


class _Nowhere:
    async def write(self, data: bytes, *, stderr: bool) -> None:
        return


def gone() -> AgentGone:
    """Return what a caller gets of a guest that is off."""
    return AgentGone("the guest agent does not answer: the fake guest is off")


def _check_id(what: str, value: str) -> None:
    if not ID.fullmatch(value):
        raise AgentError(f'{what} "{value}" must be 1 to 128 letters, digits, …', Code.INVALID_ARGUMENT)


def _require(container: FakeContainer, phase: GuestPhase) -> None:
    if container.phase is not phase:
        text = f'container "{container.request.id}" is {container.phase.name.lower()}, not {phase.name.lower()}'
        raise AgentError(text, Code.FAILED_PRECONDITION)


def _resolve(request: GuestContainer) -> ContainerUser:
    name, _, group = request.user.partition(":")
    uid, gid, extra = ACCOUNTS.get(name, (None, 0, []))
    if uid is None:
        if name and not name.isdigit():
            raise AgentError(f'user "{name}" is not in the image\'s /etc/passwd', Code.INVALID_ARGUMENT)
        uid = int(name or 0)
    if group:
        gid = int(group) if group.isdigit() else gid
    groups = [gid, *request.groups, *(extra if request.image_groups else [])]
    return ContainerUser(uid=uid, gid=gid, groups=sorted(set(groups)))
