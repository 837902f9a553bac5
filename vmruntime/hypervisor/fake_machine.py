"""A virtual machine in memory, as the world has it: it outlives the daemon's hold of it (see hypervisor/fake.py).

Two small processes stand for a VM's QEMU and vsock helper, so that what the daemon writes down (pids), kills and
finds again is real; they end with the process that made them. Connections to the guest go through a hybrid socket with
the same handshake as vhost-device-vsock's. A machine started by firmware has the sockets and the console file of its
directory, and a guest that boots when it is let run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.aio.faults import Faults
from vmruntime.aio.tasks import TaskScope
from vmruntime.hypervisor.endings import end_by_status
from vmruntime.hypervisor.interface import Disk, FirmwareBoot, Nic, Recorder, VmEnd, VmHandle, VmSpec

COPY_BYTES = 65536
RFB_VERSION = b"RFB 003.008\n"
PANIC = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b"


class Guest(Protocol):
    """What runs in a VM."""

    async def boot(self, machine: FakeMachine) -> None:
        """Come up: say so on the console, listen on ports."""

    async def die(self) -> None:
        """End at once: the power is gone."""


class FakeMachine:
    """One VM.

    Attributes:
        disks, nics: What is plugged in, by serial and by id.
        size: What it has grown to.
        console: Every line the guest said.
        ports: The unix socket behind each vsock port the guest listens on.
        process: Stands for QEMU; killing it ends the VM.
        end: How it ended; None: it runs.
        collected: It was ended by kill(), and nobody finds it any more.
        reboots, presses: How often it booted again, and how often the power button was pressed.
        obedient: The guest powers off when the button is pressed.
        typed: What was sent to the serial console by DIRECTORY/console.sock.
        on_typed: Called with each piece of it.
        balloon: What balloon_stats() says.
    """

    def __init__(self, spec: VmSpec, faults: Faults) -> None:
        self.spec = spec
        self.directory = spec.directory
        self.faults = faults
        self.disks: dict[str, Disk] = {disk.serial: disk for disk in spec.disks}
        self.nics: dict[str, Nic] = {} if spec.nic is None else {spec.nic.nic.id: spec.nic.nic}
        self.shares: list[str] = []
        self.size = spec.size
        self.console: list[str] = []
        self.ports: dict[int, Path] = {}
        self.process: DetachedProcess
        self.handle: VmHandle
        self.reason = ""
        self.end: VmEnd | None = None
        self.collected = False
        self.reboots = 0
        self.presses = 0
        self.obedient = True
        self.typed = b""
        self.on_typed: Callable[[bytes], None] = lambda data: None
        self.balloon: dict[str, int] = {}
        self._going = asyncio.Event()
        self.held = ""
        self._guest: Guest
        self._booted = False
        self._agent: Path | None = None
        self._joined: socket.socket | None = None
        self._power: int | None = None
        self._said = asyncio.Event()
        self._listening = asyncio.Event()
        self._ended = asyncio.Event()
        self._scope = TaskScope(f"fake vm {spec.id[:13]}")
        self._serving: list[asyncio.Task[None]] = []

    @property
    def by_firmware(self) -> bool:
        """Whether it boots from its disk."""
        return isinstance(self.spec.boot, FirmwareBoot)

    def say(self, line: str) -> None:
        """Write a line on the console."""
        self.console.append(line)
        if self.by_firmware:
            data = f"{line}\r\n".encode()
            with (self.directory / "console.log").open("ab") as file:
                file.write(data)
            if self._joined is not None:
                with contextlib.suppress(OSError):
                    self._joined.send(data)  # who reads too slowly misses something, as with QEMU
        self._said.set()
        self._said = asyncio.Event()

    def serve_agent(self, path: Path) -> None:
        """Say on which unix socket the guest's QEMU guest agent listens, from now on."""
        self._agent = path
        self._listening.set()

    @property
    def running(self) -> bool:
        """Whether its processors are not held."""
        return self._going.is_set()

    def hold(self) -> None:
        """Hold the processors: the guest hears nothing; what it does by itself in memory goes on."""
        self._going.clear()

    def run(self) -> None:
        """Let the processors go; the first time, the guest boots."""
        self._going.set()
        if not self._booted:
            self._booted = True
            self._serving.append(self._scope.start(self._boot(), "boot"))

    def press(self) -> None:
        """Press the power button."""
        self.presses += 1
        if self.obedient:
            self.power_off()

    def power_off(self, reason: str = "the guest powered off") -> None:
        """End the VM from inside."""
        self._turn_off(VmEnd.POWEROFF, reason)

    def panic(self, message: str = PANIC) -> None:
        """Let the guest's kernel fail."""
        self.say(message)
        self._turn_off(VmEnd.CRASH, "the guest's kernel panicked")

    async def reboot(self) -> None:
        """Boot again: the guest asked for it, or the reset button was pressed."""
        self.reboots += 1
        self._agent = None
        self._listening.clear()
        await self._guest.die()
        await self._boot()

    async def crash(self) -> None:
        """Kill the process that stands for QEMU."""
        self.end = self.end or VmEnd.KILLED
        await self.process.end()
        await self._ended.wait()

    async def lose(self) -> None:
        """Let the hypervisor fail."""
        self.end = self.end or VmEnd.LOST
        self.reason = self.reason or "QEMU ended with status 1: it said nothing"
        await self.crash()

    async def wait_for_line(self, text: str) -> None:
        """Wait until the console has a line with this text."""
        while not any(text in line for line in self.console):
            await self._said.wait()

    async def wait(self) -> str:
        """Wait for the end."""
        await self._ended.wait()
        return self.reason

    @property
    def ended(self) -> bool:
        """Whether it does not run any more."""
        return self._ended.is_set()

    async def launch(self, guest: Guest, record: Recorder) -> None:
        """Start the processes, then the guest; what was started ends when something fails."""
        self._guest = guest
        async with contextlib.AsyncExitStack() as undo:
            reader, self._power = os.pipe()
            undo.callback(self.power_off)
            try:
                helpers = [await self._process("vsock", reader, record)] if self.spec.cid else []
                for helper in helpers:
                    undo.push_async_callback(helper.end)
                self.process = await self._process("qemu", reader, record)
                undo.push_async_callback(self.process.end)
            finally:
                os.close(reader)
            hybrid = self.directory / "helpers" / "vsock.sock"
            boot = self.spec.boot
            self.handle = VmHandle(
                id=self.spec.id,
                driver="fake",
                process=self.process.identity,
                helpers=[helper.identity for helper in helpers],
                directory=str(self.directory),
                cid=self.spec.cid,
                vsock=str(hybrid) if self.spec.cid else "",
                uuid=boot.uuid if isinstance(boot, FirmwareBoot) else "",
            )
            self._listen(hybrid, undo)
            self._scope.start(self._watch(helpers), "end")
            if not self.by_firmware and not self.spec.frozen:
                self.run()
            undo.pop_all()

    async def close(self) -> None:
        """End everything; for the end of a test."""
        self.power_off("the test is over")
        await self._ended.wait()
        await self._scope.close()

    def _turn_off(self, end: VmEnd, reason: str) -> None:
        if self._power is not None:
            self.end = self.end or end
            self.reason = self.reason or reason
            os.close(self._power)
            self._power = None

    async def _process(self, role: str, reader: int, record: Recorder) -> DetachedProcess:
        async def recorded(identity: ProcessIdentity) -> None:
            await self.faults.at(f"vm.process {role}")
            await record(role, identity)

        # It reads until the power is gone: when the VM is turned off, or when this process ends.
        return await DetachedProcess.spawn(
            ["cat", f"/dev/fd/{reader}"],
            record=recorded,
            log=self.directory / f"{role}.log",
            pass_fds=[reader],
        )

    def _listen(self, hybrid: Path, undo: contextlib.AsyncExitStack) -> None:
        services: dict[Path, Callable[[socket.socket], Coroutine[Any, Any, None]]] = {}
        if self.spec.cid:
            services[hybrid] = self._connected
        boot = self.spec.boot
        if isinstance(boot, FirmwareBoot):
            (self.directory / "console.log").touch()
            services[self.directory / "console.sock"] = self._console_joined
            services[self.directory / "qga.sock"] = self._agent_joined
            if boot.vnc:
                services[self.directory / "vnc.sock"] = self._screen_joined
        for path, serve in services.items():
            server = _listening(path)
            task = self._scope.start(self._accept(server, serve), path.name, owning=server.close)
            undo.callback(task.cancel)
            self._serving.append(task)

    async def _boot(self) -> None:
        await self.faults.at("vm.boot")
        await self._guest.boot(self)
        if self.spec.frozen:
            self.say("vmruntime-agent: connected uptime_us=1")

    async def _watch(self, helpers: list[DetachedProcess]) -> None:
        status = await self.process.wait()
        self.end = self.end or end_by_status(status)
        self.reason = self.reason or f"QEMU ended with status {status}: it said nothing"
        for helper in helpers:
            await helper.end()
        self.power_off()
        for task in self._serving:
            task.cancel()
        await self._guest.die()
        self._ended.set()

    async def _accept(self, server: socket.socket, serve: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> None:
        while True:
            connection = await _accepted(server)
            self._serving.append(self._scope.start(serve(connection), "connection", owning=connection.close))

    async def _console_joined(self, connection: socket.socket) -> None:
        self._joined = connection
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(connection, COPY_BYTES):
                await self._going.wait()
                self.typed += data
                self.on_typed(data)
        except OSError:
            pass  # the client is gone
        finally:
            if self._joined is connection:
                self._joined = None

    async def _screen_joined(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            await loop.sock_sendall(connection, RFB_VERSION)
            await loop.sock_recv(connection, COPY_BYTES)

    async def _agent_joined(self, connection: socket.socket) -> None:
        """Join the connection to the guest agent; what is sent before that one runs waits for it."""
        while self._agent is None:
            await self._listening.wait()
        await _join(connection, self._agent)

    async def _connected(self, connection: socket.socket) -> None:
        """Answer "CONNECT port" as vhost-device-vsock does, and join the connection to the guest's."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, ValueError):
            words = (await loop.sock_recv(connection, 64)).split()
            path = self.ports.get(int(words[1])) if words[:1] == [b"CONNECT"] else None
            if path is not None:
                await _join(connection, path, greeting=b"OK 1073741824\n")


async def _join(connection: socket.socket, path: Path, greeting: bytes = b"") -> None:
    """Copy between a connection and a listening socket, both ways, until both ends are over."""
    loop = asyncio.get_running_loop()
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as inner,
    ):
        await loop.sock_connect(inner, str(path))
        await loop.sock_sendall(connection, greeting)
        async with asyncio.TaskGroup() as group:
            group.create_task(_copy(connection, inner))
            group.create_task(_copy(inner, connection))


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Copy until end-of-file, then say so."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while data := await loop.sock_recv(source, COPY_BYTES):
            await loop.sock_sendall(sink, data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


async def _accepted(server: socket.socket) -> socket.socket:
    """Accept a connection. Unlike loop.sock_accept() it loses none when it is cancelled the moment one comes."""
    loop = asyncio.get_running_loop()
    while True:
        with contextlib.suppress(BlockingIOError):
            connection, _ = server.accept()
            connection.setblocking(False)
            return connection
        ready = asyncio.Event()
        loop.add_reader(server, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(server)


def _listening(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        server.bind(str(path))
        path.chmod(0o600)
        server.listen(16)
    except BaseException:
        server.close()
        raise
    return server
