"""A fake guest behind the real protocol: a gRPC server on a unix socket, for the real client, relay and sandboxes.

A lie that is a message of agent.proto, ordered as "rpc.Hello", is sent in place of the answer, whatever it says: that is
how a guest that breaks the protocol is tested. Of "rpc.Events" and "rpc.ReadOutput" the lie replaces one message.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Protocol

import grpc

from vmruntime.agent.errors import AgentError, AgentGone
from vmruntime.agent.fake import FakeAgent
from vmruntime.agent.fake_guest import FakeGuest
from vmruntime.agent.interface import (
    AGENT_PORT,
    GuestContainer,
    GuestContainerState,
    GuestDevice,
    GuestMemoryVolume,
    GuestSetup,
    OutputReader,
    PidMode,
    PortStream,
    ProcessStream,
)
from vmruntime.aio.tasks import TaskScope
from vmruntime.generated import agent_pb2, agent_pb2_grpc
from vmruntime.model.sandbox import Dns, IdMapping, Neighbour, NetworkInterface, NetworkRoute, UserNamespace
from vmruntime.model.streams import AttachSpec, ExecSpec, OutputChunk, TerminalSize

STOP_SECONDS = 0.0


class FakeAgentServer:
    """Serves a fake guest's agent."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest
        self._server: grpc.aio.Server | None = None

    async def start(self, socket: Path) -> None:
        """Listen on a unix socket."""
        self._server = grpc.aio.server()
        agent_pb2_grpc.add_AgentServicer_to_server(_Servicer(self._guest), self._server)
        self._server.add_insecure_port(f"unix:{socket}")
        await self._server.start()

    async def stop(self) -> None:
        """Break every connection and stop listening."""
        if self._server is not None:
            await self._server.stop(STOP_SECONDS)


class Machine(Protocol):
    """What a guest needs of the VM it runs in."""

    @property
    def disks(self) -> Mapping[str, object]:
        """The disks it sees, by serial."""

    @property
    def ports(self) -> MutableMapping[int, Path]:
        """Where it listens: the unix socket behind each vsock port."""

    @property
    def directory(self) -> Path:
        """Where it may put sockets."""

    def say(self, line: str) -> None:
        """Write a line on the console."""

    def power_off(self) -> None:
        """Turn the VM off."""


class BootingGuest:
    """A fake guest that boots in a fake VM and listens on the agent's port."""

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self._server = FakeAgentServer(guest)

    async def boot(self, machine: Machine) -> None:
        """Come up as the real guest does."""
        self.guest.disks = lambda: set(machine.disks)
        self.guest.on_power_off = machine.power_off
        socket = machine.directory / "guest.sock"
        await self._server.start(socket)
        machine.ports[AGENT_PORT] = socket
        machine.say("vmruntime-agent: ready")

    async def die(self) -> None:
        """Be gone."""
        await self.guest.die()
        await self._server.stop()


class _Servicer(agent_pb2_grpc.AgentServicer):
    """Translates messages to a FakeAgent and back."""

    def __init__(self, guest: FakeGuest) -> None:
        self._faults = guest.faults
        self._agent = FakeAgent(guest)

    async def Hello(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            hello = await self._agent.hello()
            answer = agent_pb2.HelloResponse(
                protocol=1,
                agent_version=hello.version,
                kernel_release=hello.kernel,
                sandbox_id=hello.sandbox_id,
                uptime_us=hello.uptime_us,
                agent_started_us=hello.started_us,
                user_namespaces=hello.user_namespaces,
            )
            return self._faults.answer("rpc.Hello", answer)

    async def SetupSandbox(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            await self._agent.setup(_setup(request))
            return agent_pb2.SetupSandboxResponse()

    async def Prepare(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            await self._agent.prepare(request.entropy, request.scratch_serial, request.oci_spec)
            return agent_pb2.PrepareResponse()

    async def CreateContainer(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            pid, user = await self._agent.create(_container(request))
            answer = agent_pb2.CreateContainerResponse(pid=pid, uid=user.uid, gid=user.gid, groups=user.groups)
            return self._faults.answer("rpc.CreateContainer", answer)

    async def StartContainer(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            answer = agent_pb2.StartContainerResponse(started_at_unix_ns=await self._agent.start(request.id))
            return self._faults.answer("rpc.StartContainer", answer)

    async def SignalContainer(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            await self._agent.signal(request.id, request.signal, everyone=request.all)
            return agent_pb2.SignalContainerResponse()

    async def DeleteContainer(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            answer = agent_pb2.DeleteContainerResponse(released_serials=await self._agent.delete(request.id))
            return self._faults.answer("rpc.DeleteContainer", answer)

    async def ListContainers(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            states = [_state(one) for one in await self._agent.containers()]
            return self._faults.answer("rpc.ListContainers", agent_pb2.ListContainersResponse(containers=states))

    async def Events(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with _statuses(context):
            async for state in self._agent.events():
                yield self._faults.answer("rpc.Events", _state(state))

    async def ReadOutput(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        first = await anext(aiter(requests))
        async with _statuses(context), self._agent.output(first.container_id, first.after_seq) as reader:
            async with _beside(_acknowledge(requests, reader)):
                async for record in reader:
                    stream = agent_pb2.OutputRecord.STDERR if record.stderr else agent_pb2.OutputRecord.STDOUT
                    answer = agent_pb2.OutputRecord(
                        seq=record.seq,
                        stream=stream,
                        time_unix_ns=record.time_ns,
                        partial=record.partial,
                        data=record.data,
                    )
                    yield self._faults.answer("rpc.ReadOutput", answer)

    async def Exec(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        messages = aiter(requests)
        start = (await anext(messages)).start
        spec = ExecSpec(
            container_id=start.container_id,
            argv=list(start.args),
            tty=start.tty,
            stdin=start.stdin,
            timeout=start.timeout_ms / 1000,
        )
        async with _statuses(context), self._agent.exec(spec) as command, _fed(messages, command):
            async for chunk in command.output():
                yield agent_pb2.ExecResponse(**_written(chunk))
            end = command.end
            exited = agent_pb2.ExecExited(exit_code=end.exit_code, timed_out=end.timed_out, error=end.error)
            yield self._faults.answer("rpc.Exec", agent_pb2.ExecResponse(exited=exited))

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        messages = aiter(requests)
        start = (await anext(messages)).start
        spec = AttachSpec(container_id=start.container_id, stdin=start.stdin, stdout=start.stdout, stderr=start.stderr)
        async with _statuses(context), self._agent.attach(spec) as container, _fed(messages, container):
            async for chunk in container.output():
                if chunk.data:
                    yield agent_pb2.AttachResponse(**_written(chunk))
                else:
                    yield agent_pb2.AttachResponse(started=True)
            yield self._faults.answer("rpc.Attach", agent_pb2.AttachResponse(ended=agent_pb2.AttachEnded()))

    async def PortForward(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        messages = aiter(requests)
        port = (await anext(messages)).port
        async with _statuses(context), self._agent.ports() as ports, ports.connect(port) as connection:
            yield agent_pb2.PortForwardResponse(connected=True)
            async with _forwarded(messages, connection):
                async for data in connection.read():
                    yield agent_pb2.PortForwardResponse(data=data)
            yield self._faults.answer("rpc.PortForward", agent_pb2.PortForwardResponse(closed=True))

    async def Stats(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            usage = await self._agent.stats(list(request.container_ids))
            answer = agent_pb2.StatsResponse(
                time_unix_ns=usage.time,
                guest_memory_total_bytes=usage.memory_total,
                guest_memory_available_bytes=usage.memory_available,
                containers=[
                    agent_pb2.ContainerStats(
                        id=one.id,
                        cpu_usage_ns=one.cpu_ns,
                        memory_usage_bytes=one.memory_usage,
                        memory_working_set_bytes=one.memory_working_set,
                    )
                    for one in usage.containers
                ],
            )
            return self._faults.answer("rpc.Stats", answer)

    async def UpdateContainer(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            await self._agent.update(request.id, request.resources)
            return agent_pb2.UpdateContainerResponse()

    async def OnlineCpus(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            await self._agent.online_cpus(request.count)
            return self._faults.answer("rpc.OnlineCpus", agent_pb2.OnlineCpusResponse(online=request.count))

    async def Shutdown(self, request: Any, context: Any) -> Any:
        async with _statuses(context):
            await self._agent.shutdown(request.grace_ms / 1000)
            return agent_pb2.ShutdownResponse()


@contextlib.asynccontextmanager
async def _statuses(context: Any) -> AsyncIterator[None]:
    """Answer the agent's errors as the real agent does."""
    try:
        yield
    except AgentGone as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
    except AgentError as error:
        name, _, rest = error.message.partition(": ")
        if name in grpc.StatusCode.__members__:  # a status that vmruntime.errors has no code for
            await context.abort(grpc.StatusCode[name], rest)
        await context.abort(grpc.StatusCode[error.code.name], error.message)


async def _acknowledge(requests: Any, reader: OutputReader) -> None:
    async for request in requests:
        await reader.acknowledge(request.after_seq)


@contextlib.asynccontextmanager
async def _fed(messages: AsyncIterator[Any], process: ProcessStream) -> AsyncIterator[None]:
    """Pass the client's messages on to a process while the body runs."""

    async def feed() -> None:
        async for message in messages:
            which = message.WhichOneof("message")
            if which == "stdin":
                await process.write(message.stdin)
            elif which == "stdin_closed":
                await process.close_input()
            elif which == "resize":
                await process.resize(TerminalSize(columns=message.resize.columns, rows=message.resize.rows))
        await process.close_input()

    async with _beside(feed()):
        yield


@contextlib.asynccontextmanager
async def _forwarded(messages: AsyncIterator[Any], connection: PortStream) -> AsyncIterator[None]:
    """Pass the client's messages on to a port while the body runs."""

    async def forward() -> None:
        async for message in messages:
            if message.WhichOneof("message") == "data":
                await connection.write(message.data)
        await connection.close_write()

    async with _beside(forward()):
        yield


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    scope = TaskScope("fake agent: input")
    scope.start(work, "read")
    try:
        yield
    finally:
        await scope.close()


def _written(chunk: OutputChunk) -> dict[str, Any]:
    return {"stderr" if chunk.stderr else "stdout": chunk.data}


def _state(state: GuestContainerState) -> Any:
    return agent_pb2.ContainerState(
        id=state.id,
        phase=agent_pb2.ContainerState.Phase.ValueType(state.phase.value),
        pid=state.pid,
        started_at_unix_ns=state.started_at,
        exited_at_unix_ns=state.exited_at,
        exit_code=state.exit_code,
        oom_killed=state.oom_killed,
    )


def _setup(request: Any) -> GuestSetup:
    return GuestSetup(
        sandbox_id=request.sandbox_id,
        hostname=request.hostname,
        time_ns=request.time_unix_ns,
        entropy=request.entropy,
        interfaces=[
            NetworkInterface(
                name=one.name,
                mac=one.mac,
                mtu=one.mtu,
                addresses=list(one.addresses),
                tap="",
                neighbours=[Neighbour(address=near.address, mac=near.mac) for near in one.neighbours],
                device_mac=one.device_mac,
            )
            for one in request.interfaces
        ],
        routes=[
            NetworkRoute(
                destination=one.destination,
                gateway=one.gateway,
                interface=one.interface,
                metric=one.metric,
                mtu=one.mtu,
                source=one.source,
            )
            for one in request.routes
        ],
        dns=Dns(
            servers=list(request.dns.servers), searches=list(request.dns.searches), options=list(request.dns.options)
        ),
        sysctls=dict(request.sysctls),
        scratch_serial=request.scratch_serial,
        shared_pid_namespace=request.shared_pid_namespace,
        host_ipc=request.host_ipc,
        user=_user_namespace(request),
    )


def _user_namespace(request: Any) -> UserNamespace | None:
    if not request.HasField("user_namespace"):
        return None
    uids, gids = (
        IdMapping(container_id=one.container_id, host_id=one.host_id, length=one.length)
        for one in (*request.user_namespace.uids, *request.user_namespace.gids)
    )
    return UserNamespace(uids=uids, gids=gids)


def _container(request: Any) -> GuestContainer:
    return GuestContainer(
        id=request.id,
        oci_spec=request.oci_spec,
        layer_serials=[layer.serial for layer in request.layers],
        readonly_rootfs=request.readonly_rootfs,
        user=request.user,
        groups=list(request.supplemental_groups),
        image_groups=request.image_groups,
        pid_mode=PidMode(request.pid_mode),
        pid_target=request.pid_target,
        tty=request.tty,
        stdin=request.stdin,
        stdin_once=request.stdin_once,
        share_tag=request.share_tag,
        memory_volumes=[
            GuestMemoryVolume(key=one.key, size=one.size_bytes, uid=one.uid, gid=one.gid, mode=one.mode)
            for one in request.memory_volumes
        ],
        image_volumes=[[layer.serial for layer in volume.layers] for volume in request.image_volumes],
        devices=[
            GuestDevice(
                path=one.path,
                permissions=one.permissions,
                serial=one.serial,
                source=one.source,
                type=one.type,
                major=one.major,
                minor=one.minor,
                mode=one.mode if one.HasField("mode") else None,
                uid=one.uid if one.HasField("uid") else None,
                gid=one.gid if one.HasField("gid") else None,
                users=one.users,
            )
            for one in request.devices
        ],
    )
