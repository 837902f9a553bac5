"""An agent in memory: what a VM's inside does, without the VM.

FakeGuest (fake_guest.py) is the inside; it lives until it is powered off or die() is called. FakeAgent is one connection
to it and implements agent.interface.Agent, as the real client does; fake_server.py lets the real client talk to it.
Faults are ordered by the names of the agent's methods: "agent.create", and "agent.create done".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from vmruntime.agent.errors import AgentError
from vmruntime.agent.fake_guest import FakeGuest, gone
from vmruntime.agent.fake_streams import Attach, Echo, Exec, collect
from vmruntime.agent.interface import (
    AgentHello,
    ExecOutput,
    GuestContainer,
    GuestContainerState,
    GuestSetup,
    OutputReader,
)
from vmruntime.model.container import ContainerUser
from vmruntime.model.output import OutputRecord
from vmruntime.model.stats import GuestUsage
from vmruntime.model.streams import AttachSpec, ExecSpec

__all__ = ["FakeAgent", "FakeGuest"]

T = TypeVar("T")


class FakeAgent:
    """A connection to a fake guest; implements agent.interface.Agent."""

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self._closed = False
        self._closing = asyncio.Event()

    async def hello(self) -> AgentHello:
        """Say who answers."""

        async def work() -> AgentHello:
            setup = self.guest.setup
            return AgentHello(
                version="fake",
                kernel="6.1.0-fake",
                sandbox_id=setup.sandbox_id if setup else "",
                uptime_us=300_000,
                started_us=200_000,
                user_namespaces=True,
            )

        return await self._call("hello", work)

    async def setup(self, setup: GuestSetup) -> None:
        """Turn the guest into a pod's sandbox."""

        async def work() -> None:
            self.guest.set_up(setup)

        await self._call("setup", work)

    async def prepare(self, entropy: bytes, scratch_serial: str, oci_spec: bytes) -> None:
        """Do ahead what setup() would have to wait for."""

        async def work() -> None:
            self.guest.prepare(scratch_serial)

        await self._call("prepare", work)

    async def create(self, container: GuestContainer) -> tuple[int, ContainerUser]:
        """Create a container."""

        async def work() -> tuple[int, ContainerUser]:
            return self.guest.create(container)

        return await self._call("create", work)

    async def start(self, container_id: str) -> int:
        """Start a container."""

        async def work() -> int:
            return self.guest.start(container_id)

        return await self._call("start", work)

    async def signal(self, container_id: str, signal: int, *, everyone: bool = False) -> None:
        """Signal a container; it has one process, so `everyone` is that."""

        async def work() -> None:
            self.guest.signal(container_id, signal)

        await self._call("signal", work)

    async def delete(self, container_id: str) -> list[str]:
        """Kill and remove a container."""

        async def work() -> list[str]:
            return self.guest.delete(container_id)

        return await self._call("delete", work)

    async def containers(self) -> list[GuestContainerState]:
        """Return every container's state."""

        async def work() -> list[GuestContainerState]:
            return [one.state for one in self.guest.containers.values()]

        return await self._call("containers", work)

    async def events(self) -> AsyncIterator[GuestContainerState]:
        """Iterate over every container's state, then over changes."""
        self._check()
        await self.guest.faults.at("agent.events")
        seen = len(self.guest.changes)
        for container in list(self.guest.containers.values()):
            yield container.state
        while True:
            while seen < len(self.guest.changes):
                seen += 1
                yield self.guest.faults.answer("agent.events", self.guest.changes[seen - 1])
            await self._or_gone(self.guest.news.wait())

    @contextlib.asynccontextmanager
    async def output(self, container_id: str, after_seq: int) -> AsyncIterator[OutputReader]:
        """Read a container's output after record `after_seq`."""
        self._check()
        await self.guest.faults.at("agent.output")
        yield _Reader(self, container_id, after_seq)

    async def exec_sync(self, container_id: str, argv: list[str], timeout: float, limit: int) -> ExecOutput:
        """Run a command to its end; a caller that goes away kills it."""
        spec = ExecSpec(container_id=container_id, argv=argv, timeout=timeout)
        async with self.exec(spec) as command:
            stdout, stderr, end = await self._or_gone(collect(command, limit))
        return self.guest.faults.answer("agent.exec_sync", ExecOutput(stdout=stdout, stderr=stderr, end=end))

    @contextlib.asynccontextmanager
    async def exec(self, spec: ExecSpec) -> AsyncIterator[Exec]:
        """Run a command."""
        self._check()
        await self._or_gone(self.guest.faults.at("agent.exec"))
        yield self.guest.exec(spec)

    @contextlib.asynccontextmanager
    async def attach(self, spec: AttachSpec) -> AsyncIterator[Attach]:
        """Join a container's streams."""
        self._check()
        await self._or_gone(self.guest.faults.at("agent.attach"))
        yield self.guest.attach(spec)

    @contextlib.asynccontextmanager
    async def ports(self) -> AsyncIterator[FakePorts]:
        """Open the way to the guest's ports."""
        self._check()
        await self._or_gone(self.guest.faults.at("agent.ports"))
        yield FakePorts(self.guest)

    async def stats(self, container_ids: list[str]) -> GuestUsage:
        """Return what the guest and containers use."""

        async def work() -> GuestUsage:
            return self.guest.usage(container_ids)

        return await self._call("stats", work)

    async def update(self, container_id: str, resources: bytes) -> None:
        """Change a container's limits."""

        async def work() -> None:
            self.guest.update(container_id, resources)

        await self._call("update", work)

    async def online_cpus(self, count: int) -> None:
        """Use so many processors."""

        async def work() -> None:
            self.guest.cpus = count

        await self._call("online_cpus", work)

    async def shutdown(self, grace: float) -> None:
        """Turn the guest off; the answer comes before the power goes."""

        async def work() -> None:
            self.guest.start_task(self.guest.power_off(grace), "power off")

        await self._call("shutdown", work)

    async def close(self) -> None:
        """Disconnect."""
        self._closed = True
        self._closing.set()

    async def _call(self, name: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a call in the guest, with the faults that were ordered before and after it."""
        self._check()
        step = f"agent.{name}"

        async def whole() -> T:
            await self.guest.faults.at(step)
            result = await work()
            await self.guest.faults.at(f"{step} done")
            return self.guest.faults.answer(step, result)

        return await self._or_gone(self.guest.run(whole()))

    def _check(self) -> None:
        if self._closed or not self.guest.alive:
            raise gone()

    async def _or_gone(self, work: Awaitable[T]) -> T:
        """Await something of the guest's; AgentGone when the guest dies or this connection is closed first."""
        task = asyncio.ensure_future(work)
        ends = [asyncio.ensure_future(event.wait()) for event in (self.guest.died, self._closing)]
        try:
            await asyncio.wait({task, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise gone()
            return task.result()
        finally:
            for one in (task, *ends):
                one.cancel()
            await asyncio.wait({task, *ends})


class FakePorts:
    """Implements agent.interface.PortDialer."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest

    @contextlib.asynccontextmanager
    async def connect(self, port: int) -> AsyncIterator[Echo]:
        """Connect to a port."""
        yield self._guest.connect(port)


class _Reader:
    def __init__(self, agent: FakeAgent, container_id: str, after_seq: int) -> None:
        self._agent = agent
        self._container_id = container_id
        self._after_seq = after_seq

    async def __aiter__(self) -> AsyncIterator[OutputRecord]:
        output = self._agent.guest.container(self._container_id).output
        output.acknowledge(self._after_seq)
        records = output.read(self._after_seq)
        while True:
            try:
                record = await self._agent._or_gone(anext(records))
            except StopAsyncIteration:
                return
            yield self._agent.guest.faults.answer("agent.output", record)

    async def acknowledge(self, seq: int) -> None:
        with contextlib.suppress(AgentError):
            self._agent.guest.container(self._container_id).output.acknowledge(seq)
