"""The agent's client over grpc.aio."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from vmruntime import tracing
from vmruntime.agent import checks
from vmruntime.agent.calls import Stub, call, messages, open_channel, sent
from vmruntime.agent.errors import AgentError, AgentGone, AgentLied
from vmruntime.agent.interface import (
    AgentHello,
    ExecOutput,
    GuestContainer,
    GuestContainerState,
    GuestSetup,
    OutputReader,
)
from vmruntime.agent.streams import AttachStream, ExecStream, PortStream
from vmruntime.agent.usage import guest_usage
from vmruntime.generated import agent_pb2
from vmruntime.model.container import ContainerUser
from vmruntime.model.output import OutputRecord
from vmruntime.model.sandbox import UserNamespace
from vmruntime.model.stats import GuestUsage
from vmruntime.model.streams import AttachSpec, ExecSpec

PROTOCOL = 1
CALL_TIMEOUT = 60.0
STATS_TIMEOUT = 5.0
"""kubelet asks for all pods at once, every ten seconds or so: one slow guest must not hold up the others' numbers."""
EXEC_SLACK = 20.0


class AgentClient:
    """Implements agent.interface.Agent on a relay's unix socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel = open_channel(socket)
        self._stub: Any = Stub(self._channel)

    async def close(self) -> None:
        """Disconnect; calls under way end with AgentGone."""
        self._stub = _ClosedStub()
        await self._channel.close(None)

    async def connect(self) -> None:
        """Wait until there is a connection; the first call makes one as well."""
        await self._channel.channel_ready()

    async def hello(self) -> AgentHello:
        """Ask who answers.

        Raises:
            AgentLied: It speaks another protocol.
        """
        answer = await call(self._stub.Hello(agent_pb2.HelloRequest(protocol=PROTOCOL), timeout=CALL_TIMEOUT))
        if answer.protocol != PROTOCOL:
            raise AgentLied(f"it speaks protocol {answer.protocol}, not {PROTOCOL}; rebuild the guest (make guest)")
        return AgentHello(
            version=checks.text(answer.agent_version, "its version", 64),
            kernel=checks.text(answer.kernel_release, "the kernel's release", 128),
            sandbox_id=checks.text(answer.sandbox_id, "the sandbox id", 128),
            uptime_us=answer.uptime_us,
            started_us=answer.agent_started_us,
            user_namespaces=answer.user_namespaces,
        )

    async def setup(self, setup: GuestSetup) -> None:
        """Turn the guest into a pod's sandbox."""
        request = agent_pb2.SetupSandboxRequest(
            sandbox_id=setup.sandbox_id,
            hostname=setup.hostname,
            time_unix_ns=setup.time_ns,
            entropy=setup.entropy,
            interfaces=[
                agent_pb2.Interface(
                    name=nic.name,
                    mac=nic.mac,
                    mtu=nic.mtu,
                    addresses=nic.addresses,
                    neighbours=[agent_pb2.Neighbour(address=one.address, mac=one.mac) for one in nic.neighbours],
                    device_mac=nic.device_mac,
                )
                for nic in setup.interfaces
            ],
            routes=[agent_pb2.Route(**msgspec.structs.asdict(route)) for route in setup.routes],
            dns=agent_pb2.Dns(servers=setup.dns.servers, searches=setup.dns.searches, options=setup.dns.options),
            sysctls=setup.sysctls,
            scratch_serial=setup.scratch_serial,
            shared_pid_namespace=setup.shared_pid_namespace,
            host_ipc=setup.host_ipc,
            user_namespace=_user_namespace(setup.user),
        )
        began = time.monotonic()
        answer = await call(self._stub.SetupSandbox(request, timeout=CALL_TIMEOUT))
        tracing.measured(began, checks.phases(answer.phases))

    async def prepare(self, entropy: bytes, scratch_serial: str, oci_spec: bytes) -> None:
        """Do ahead what setup() and the first create() would have to wait for."""
        request = agent_pb2.PrepareRequest(entropy=entropy, scratch_serial=scratch_serial, oci_spec=oci_spec)
        began = time.monotonic()
        answer = await call(self._stub.Prepare(request, timeout=CALL_TIMEOUT))
        tracing.measured(began, checks.phases(answer.phases))

    async def create(self, container: GuestContainer) -> tuple[int, ContainerUser]:
        """Create a container; return its pid in the guest and the user it resolved."""
        request = agent_pb2.CreateContainerRequest(
            id=container.id,
            oci_spec=container.oci_spec,
            layers=[_layer(name) for name in container.layer_serials],
            readonly_rootfs=container.readonly_rootfs,
            user=container.user,
            supplemental_groups=container.groups,
            image_groups=container.image_groups,
            pid_mode=agent_pb2.PidMode.ValueType(container.pid_mode.value),
            pid_target=container.pid_target,
            tty=container.tty,
            stdin=container.stdin,
            stdin_once=container.stdin_once,
            share_tag=container.share_tag,
            memory_volumes=[
                agent_pb2.MemoryVolume(key=one.key, size_bytes=one.size, uid=one.uid, gid=one.gid, mode=one.mode)
                for one in container.memory_volumes
            ],
            image_volumes=[
                agent_pb2.ImageVolume(layers=[_layer(name) for name in serials]) for serials in container.image_volumes
            ],
            devices=[agent_pb2.Device(**msgspec.structs.asdict(one)) for one in container.devices],
            all_devices=container.all_devices,
        )
        began = time.monotonic()
        answer = await call(self._stub.CreateContainer(request, timeout=CALL_TIMEOUT))
        tracing.measured(began, checks.phases(answer.phases))
        if len(answer.groups) > 65536:
            raise AgentLied("a user has more than 65536 groups")
        user = ContainerUser(uid=answer.uid, gid=answer.gid, groups=list(answer.groups))
        return checks.number(answer.pid, "a pid", 1, 1 << 22), user

    async def start(self, container_id: str) -> int:
        """Start a container; return when, in nanoseconds since the epoch."""
        request = agent_pb2.StartContainerRequest(id=container_id)
        answer = await call(self._stub.StartContainer(request, timeout=CALL_TIMEOUT))
        return checks.number(answer.started_at_unix_ns, "a start time", 1, checks.NS_LIMIT)

    async def signal(self, container_id: str, signal: int, *, everyone: bool = False) -> None:
        """Signal the container's first process, or every process."""
        request = agent_pb2.SignalContainerRequest(id=container_id, signal=signal, all=everyone)
        await call(self._stub.SignalContainer(request, timeout=CALL_TIMEOUT))

    async def delete(self, container_id: str) -> list[str]:
        """Kill and remove a container; return the serials of layer disks that nothing uses any more."""
        request = agent_pb2.DeleteContainerRequest(id=container_id)
        answer = await call(self._stub.DeleteContainer(request, timeout=CALL_TIMEOUT))
        return [checks.text(serial, "a serial", 36) for serial in answer.released_serials[:1024]]

    async def containers(self) -> list[GuestContainerState]:
        """Return every container the agent knows."""
        answer = await call(self._stub.ListContainers(agent_pb2.ListContainersRequest(), timeout=CALL_TIMEOUT))
        return [checks.container_state(state) for state in answer.containers]

    async def events(self) -> AsyncIterator[GuestContainerState]:
        """Iterate over every container's state, then over changes."""
        stream = self._stub.Events(agent_pb2.EventsRequest())
        async for message in messages(stream):
            yield checks.container_state(message)

    @contextlib.asynccontextmanager
    async def output(self, container_id: str, after_seq: int) -> AsyncIterator[OutputReader]:
        """Read a container's output after record `after_seq`."""
        stream = self._stub.ReadOutput()
        try:
            await sent(stream.write(agent_pb2.ReadOutputRequest(container_id=container_id, after_seq=after_seq)))
            yield _OutputStream(stream, after_seq)
        finally:
            stream.cancel()

    async def exec_sync(self, container_id: str, argv: list[str], timeout: float, limit: int) -> ExecOutput:
        """Run a command to its end; `limit` bytes of each output are kept; timeout 0: none."""
        stream = self._stub.Exec(timeout=timeout + EXEC_SLACK if timeout > 0 else None)
        kept = {False: bytearray(), True: bytearray()}
        try:
            command = ExecStream(stream)
            await command.start(ExecSpec(container_id=container_id, argv=argv, timeout=timeout))
            async for chunk in command.output():
                output = kept[chunk.stderr]
                output += chunk.data[: max(0, limit - len(output))]
            return ExecOutput(stdout=bytes(kept[False]), stderr=bytes(kept[True]), end=command.end)
        finally:
            stream.cancel()

    @contextlib.asynccontextmanager
    async def exec(self, spec: ExecSpec) -> AsyncIterator[ExecStream]:
        """Run a command; leaving the block before its end kills it."""
        async with self._session() as stub:
            stream = stub.Exec()
            try:
                command = ExecStream(stream)
                await command.start(spec)
                yield command
            finally:
                stream.cancel()

    @contextlib.asynccontextmanager
    async def attach(self, spec: AttachSpec) -> AsyncIterator[AttachStream]:
        """Join a container's streams; leaving the block leaves it running."""
        async with self._session() as stub:
            stream = stub.Attach()
            try:
                container = AttachStream(stream)
                await container.start(spec)
                yield container
            finally:
                stream.cancel()

    @contextlib.asynccontextmanager
    async def ports(self) -> AsyncIterator[Ports]:
        """Open the way to the sandbox's ports."""
        async with self._session() as stub:
            yield Ports(stub)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[Any]:
        channel = open_channel(self._socket)
        try:
            yield Stub(channel)
        finally:
            await channel.close(None)

    async def stats(self, container_ids: list[str]) -> GuestUsage:
        """Return what the sandbox and containers use."""
        request = agent_pb2.StatsRequest(container_ids=container_ids)
        answer = await call(self._stub.Stats(request, timeout=STATS_TIMEOUT))
        return guest_usage(answer)

    async def update(self, container_id: str, resources: bytes) -> None:
        """Change a container's limits."""
        request = agent_pb2.UpdateContainerRequest(id=container_id, resources=resources)
        await call(self._stub.UpdateContainer(request, timeout=CALL_TIMEOUT))

    async def online_cpus(self, count: int) -> None:
        """Wait until the guest uses so many processors."""
        await call(self._stub.OnlineCpus(agent_pb2.OnlineCpusRequest(count=count), timeout=CALL_TIMEOUT))

    async def shutdown(self, grace: float) -> None:
        """Ask the guest to stop its containers within `grace` seconds and power off."""
        request = agent_pb2.ShutdownRequest(grace_ms=round(grace * 1000))
        await call(self._stub.Shutdown(request, timeout=grace + 5.0))


class _ClosedStub:
    """Stands where the stub was: grpc.aio raises an error of its own for a call on a closed channel."""

    def __getattr__(self, name: str) -> Any:
        raise AgentGone("the connection to the guest agent is closed")


class _OutputStream:
    def __init__(self, stream: Any, after_seq: int) -> None:
        self._stream = stream
        self._next = after_seq + 1

    async def __aiter__(self) -> AsyncIterator[OutputRecord]:
        async for message in messages(self._stream):
            record = checks.output_record(message, self._next)
            self._next += 1
            yield record

    async def acknowledge(self, seq: int) -> None:
        """Tell the agent that everything up to `seq` may be forgotten.

        Never fails: a stream that has ended takes no acknowledgements, and why it ended is the reader's to tell.
        """
        with contextlib.suppress(AgentError):
            await sent(self._stream.write(agent_pb2.ReadOutputRequest(after_seq=seq)))


class Ports:
    """Implements agent.interface.PortDialer."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    @contextlib.asynccontextmanager
    async def connect(self, port: int) -> AsyncIterator[PortStream]:
        """Connect to a port; leaving the block breaks the connection off unless both sides have closed it."""
        stream = self._stub.PortForward()
        try:
            connection = PortStream(stream)
            await connection.connect(port)
            yield connection
        finally:
            stream.cancel()


def _user_namespace(user: UserNamespace | None) -> agent_pb2.UserNamespace | None:
    if user is None:
        return None
    uids, gids = (
        [agent_pb2.IdMapping(container_id=one.container_id, host_id=one.host_id, length=one.length)]
        for one in (user.uids, user.gids)
    )
    return agent_pb2.UserNamespace(uids=uids, gids=gids)


def _layer(name: str) -> agent_pb2.Layer:
    """Return a layer by the directory where it is mounted, or by the serial of its disk."""
    return agent_pb2.Layer(path=name) if name.startswith("/") else agent_pb2.Layer(serial=name)
