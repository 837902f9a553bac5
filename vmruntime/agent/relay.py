"""A unix socket that leads to a guest's vsock, because grpcio speaks no vsock.

Three ways lead to an agent: AF_VSOCK (the kernel's vhost-vsock), a hybrid socket (vhost-device-vsock: a unix socket on
which "CONNECT port" opens a connection, as Firecracker and Cloud Hypervisor have it), and a plain unix socket (an agent
on the host).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Protocol

import structlog

from vmruntime.aio.tasks import TaskScope

log = structlog.get_logger(__name__)

CHUNK = 256 * 1024
HANDSHAKE_TIMEOUT = 5.0
ACCEPT_PAUSE = 1.0


class Dialer(Protocol):
    """Opens connections to one agent."""

    async def dial(self) -> socket.socket:
        """Return a connected, non-blocking socket.

        Raises:
            OSError: Nobody answers (yet).
        """


class VsockDialer:
    """Dials through the kernel's vsock (vsock(7))."""

    def __init__(self, cid: int, port: int) -> None:
        self._address = (cid, port)

    async def dial(self) -> socket.socket:
        """Return a connected socket; raise OSError when nobody listens."""
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        return await _connected(connection, self._address)


class UnixDialer:
    """Dials a unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def dial(self) -> socket.socket:
        """Return a connected socket; raise OSError when nobody listens."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        return await _connected(connection, str(self._path))


class HybridDialer:
    """Dials a guest's port through vhost-device-vsock."""

    def __init__(self, path: Path, port: int) -> None:
        self._unix = UnixDialer(path)
        self._port = port

    async def dial(self) -> socket.socket:
        """Return a connected socket; raise OSError when the guest does not listen."""
        connection = await self._unix.dial()
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                await self._handshake(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _handshake(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, b"CONNECT %d\n" % self._port)
        answer = b""
        # Byte by byte: what follows the newline belongs to the guest.
        while not answer.endswith(b"\n"):
            byte = await loop.sock_recv(connection, 1)
            if not byte or len(answer) > 32:
                raise ConnectionRefusedError(f"the guest does not listen on port {self._port}")
            answer += byte
        if not answer.startswith(b"OK "):
            raise ConnectionRefusedError(f"vsock answered {answer!r}")


class Relay:
    """Listens on a unix socket (mode 0600) and joins every connection to one of the agent's."""

    def __init__(self, path: Path, dialer: Dialer) -> None:
        self._path = path
        self._dialer = dialer
        self._scope = TaskScope("relay")
        self._server: socket.socket | None = None

    async def open(self) -> None:
        """Start to listen, replacing a socket that an earlier daemon left."""
        self._path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            server.bind(str(self._path))
            self._path.chmod(0o600)
            server.listen(16)
        except BaseException:
            server.close()
            raise
        self._server = server
        self._listen()

    async def close(self) -> None:
        """Close every connection and remove the socket."""
        if self._server is not None:
            asyncio.get_running_loop().remove_reader(self._server)
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)
        await self._scope.close()

    def _listen(self) -> None:
        if self._server is not None:
            asyncio.get_running_loop().add_reader(self._server, self._accept, self._server)

    def _accept(self, server: socket.socket) -> None:
        # Not in a task: one that is cancelled at the wrong moment loses the connection it has just accepted.
        loop = asyncio.get_running_loop()
        try:
            client, _ = server.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptor is free, say; it would be tried again at once, for ever
            log.warning("a relay cannot accept", path=str(self._path), error=str(error))
            loop.remove_reader(server)
            loop.call_later(ACCEPT_PAUSE, self._listen)
            return
        client.setblocking(False)
        self._scope.start(self._join(client), "connection", owning=client.close)

    async def _join(self, client: socket.socket) -> None:
        try:
            guest = await self._dialer.dial()
        except (OSError, TimeoutError):
            return  # the client sees its connection end, and grpc tries again
        with guest, contextlib.suppress(OSError):
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(client, guest))
                group.create_task(_copy(guest, client))


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Copy until end-of-file, then half-close the other side."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        while data := await loop.sock_recv(source, CHUNK):
            await loop.sock_sendall(sink, data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


async def _connected(connection: socket.socket, address: object) -> socket.socket:
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, address)  # type: ignore[arg-type]
    except BaseException:
        connection.close()
        raise
    return connection
