"""What systemd in a machine tells of its boot: READY=1 when everything that is to start has started.

A credential in the SMBIOS (read since systemd 252) names a vsock address of the host (vmm.notify_socket, since systemd 254
with vsock-stream); there it sends sd_notify(3) messages, each over a connection of its own. Since systemd 256 also
X_SYSTEMD_UNIT_ACTIVE=ssh-access.target and the like. Other guests say nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import structlog

from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.interface import VmHandle
from vmruntime.qga.wire import shown

log = structlog.get_logger(__name__)

MESSAGE_LIMIT = 16 * 1024
CONNECTIONS = 8

QUIET_SECONDS = 1.0
"""A message is complete after such a pause, too: not every transport passes on that its sender has finished."""

MESSAGE_SECONDS = 10.0
PAUSE_SECONDS = 1.0

_HOST_CID = 2

OnNotice = Callable[[dict[str, str]], None]
"""Told a message's fields, such as {"READY": "1", "STATUS": "Ready."}; printable and short, and not to be trusted."""


def notify_credential(cid: int) -> str:
    """Return the SMBIOS string (FirmwareBoot.oem_strings) for the machine with this context id."""
    # The host's ports are common to all machines where the kernel does vsock: the id is a number nobody else has.
    return f"io.systemd.credential:vmm.notify_socket=vsock-stream:{_HOST_CID}:{cid}"


class BootNotices:
    """Listens for one machine. Open it before the machine is resumed: what is said to nobody is not said again."""

    def __init__(self, handle: VmHandle, on_notice: OnNotice) -> None:
        self._handle = handle
        self._on_notice = on_notice
        self._scope = TaskScope(f"boot of {handle.id[:13]}")
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._server: socket.socket | None = None

    async def open(self) -> None:
        """Begin to listen.

        Raises:
            FailedPrecondition: The host cannot.
        """
        try:
            if self._handle.vsock:
                self._server = _listen_beside(Path(self._handle.vsock), self._handle.cid)
            else:
                self._server = _listen_native(self._handle.cid)
        except OSError as error:
            raise FailedPrecondition(
                f"nobody can listen for the readiness of the machine {self._handle.id[:13]}: {error.strerror or error}"
            ) from error
        self._scope.start(self._accept(self._server), "accept")

    async def close(self) -> None:
        """Stop."""
        await self._scope.close()
        if self._server is not None:
            self._server.close()
            self._server = None
            if self._handle.vsock:
                _path(Path(self._handle.vsock), self._handle.cid).unlink(missing_ok=True)

    async def _accept(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._free.acquire()
            try:
                connection, peer = await loop.sock_accept(server)
            except OSError as error:
                self._free.release()
                log.warning("a machine's notice was not accepted", machine=self._handle.id, error=str(error))
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            except BaseException:
                self._free.release()
                raise
            connection.setblocking(False)
            if self._handle.vsock or peer[0] == self._handle.cid:
                self._scope.start(self._read(connection), "message", owning=functools.partial(self._done, connection))
            else:
                self._done(connection)

    def _done(self, connection: socket.socket) -> None:
        connection.close()
        self._free.release()

    async def _read(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        message = b""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(MESSAGE_SECONDS):
                while len(message) <= MESSAGE_LIMIT:
                    async with asyncio.timeout(QUIET_SECONDS):
                        data = await loop.sock_recv(connection, MESSAGE_LIMIT)
                    if not data:
                        break
                    message += data
        if len(message) > MESSAGE_LIMIT:
            log.warning("a machine's notice is too long", machine=self._handle.id)
        elif fields := _fields(message):
            self._on_notice(fields)


def _fields(message: bytes) -> dict[str, str]:
    found = {}
    for line in message.decode(errors="replace").split("\n"):
        name, equals, value = line.partition("=")
        if equals and name.isidentifier() and name.isascii() and len(name) <= 64:
            found[name] = shown(value)
    return found


def _path(hybrid: Path, port: int) -> Path:
    """Return where connections from the guest to a port of the host arrive, as Firecracker has it."""
    return hybrid.with_name(f"{hybrid.name}_{port}")


def _listen_beside(hybrid: Path, port: int) -> socket.socket:
    path = _path(hybrid, port)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        server.bind(str(path))
        _let_connect(path)
        server.listen(CONNECTIONS)
    except BaseException:
        server.close()
        raise
    return server


def _let_connect(path: Path) -> None:
    """Let everybody who reaches a socket connect to it; the directory is the helper's alone.

    So the helper may have put something else in its place.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
            raise FileExistsError(None, f"{path} is not the socket that was made there")
        os.chmod(f"/proc/self/fd/{fd}", 0o666)
    finally:
        os.close(fd)


def _listen_native(cid: int) -> socket.socket:
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        server.bind((socket.VMADDR_CID_ANY, cid))
        server.listen(CONNECTIONS)
    except BaseException:
        server.close()
        raise
    return server
