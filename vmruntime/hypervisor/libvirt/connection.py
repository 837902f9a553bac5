"""A connection to libvirt that survives the restart of its daemon; blocking calls run in threads.

It is up, or down since libvirt broke it; while it is down it is tried again every 0.2 to 2 seconds, and calls wait. After
that, who listens to a domain is told to look anew: events may have been missed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
import structlog

from vmruntime.aio.tasks import TaskScope
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.libvirt.binding import LEAST_VERSION, libvirt, libvirt_qemu, readable
from vmruntime.hypervisor.libvirt.events import LOOP

T = TypeVar("T")
log = structlog.get_logger(__name__)

CALL_TIMEOUT = 30.0
PATIENCE = 10.0
"""Seconds a call waits for a daemon that is being restarted."""
FIRST_PAUSE, LAST_PAUSE = 0.2, 2.0
KEEPALIVE_SECONDS, KEEPALIVE_MISSED = 5, 3
# Said of a connection, not of a domain.
_BROKEN = frozenset(
    {
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_RPC,
    }
)


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a domain: QEMU's own event, or RECONNECTED (it may have missed some).

    Attributes:
        data: As of qemu-qmp-ref(7).
        timestamp: "seconds" since the epoch, and "microseconds".
    """

    name: str
    data: dict[str, Any] = {}
    timestamp: dict[str, int] = {}


RECONNECTED = "RECONNECTED"
Listener = Callable[[Event], None]


class Connection:
    """Every public coroutine is called in the event loop that opened it.

    Attributes:
        uri: libvirt's URI.
        since: When it was made or made anew, in the event loop's time.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.since = 0.0
        self._scope = TaskScope(f"libvirt {uri}")
        self._up = asyncio.Event()
        self._connection: libvirt.virConnect | None = None
        self._callback = -1
        self._listeners: dict[str, list[Listener]] = {}
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, uri: str) -> Connection:
        """Connect.

        Raises:
            HypervisorError: Nobody answers there, or a libvirt that is too old.
        """
        connection = cls(uri)
        await connection._run(LOOP.hold, CALL_TIMEOUT)
        try:
            await connection._connect()
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        """Disconnect; VMs go on."""
        await self._scope.close()
        connection, self._connection = self._connection, None
        self._up.clear()
        try:
            if connection is not None:
                await self._run(lambda: self._let_go(connection), CALL_TIMEOUT)
        finally:
            await self._run(LOOP.release, CALL_TIMEOUT)

    async def call(
        self,
        function: Callable[[libvirt.virConnect], T],
        *,
        what: str,
        timeout: float = CALL_TIMEOUT,
        repeatable: bool = True,
        patience: float | None = None,
    ) -> T:
        """Run a blocking function in a thread; while libvirt is being restarted, wait for it.

        A cancelled caller still waits until the call is over.

        Args:
            function: Gets libvirt's connection.
            what: What it does, for messages.
            timeout: Seconds for one attempt.
            repeatable: It may be done again when the connection broke and nobody knows whether it was done.
            patience: Seconds to wait for a libvirt that is away; None: PATIENCE.

        Raises:
            HypervisorError: libvirt does not answer.
            libvirt.libvirtError: It refused.
        """
        deadline = self._loop.time() + (PATIENCE if patience is None else patience)
        while True:
            connection = await self._connected(deadline, what)
            try:
                return await self._run(functools.partial(function, connection), timeout)
            except libvirt.libvirtError as error:
                if not await self._is_broken(connection, error):
                    raise
                self._lost(connection)
                if not repeatable:
                    raise HypervisorError(f"libvirt went away during {what}: {error}") from error
            except TimeoutError:
                raise HypervisorError(f"libvirt did not answer {what} within {timeout:g} s") from None

    @contextlib.contextmanager
    def listening(self, uuid: str, listener: Listener) -> Iterator[None]:
        """Call `listener` in the event loop for each event of a domain, and after each reconnection."""
        self._listeners.setdefault(uuid, []).append(listener)
        try:
            yield
        finally:
            self._listeners[uuid].remove(listener)
            if not self._listeners[uuid]:
                del self._listeners[uuid]

    async def _connected(self, deadline: float, what: str) -> libvirt.virConnect:
        if self._connection is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._up.wait()
        if self._connection is None:
            raise HypervisorError(f"libvirt ({self.uri}) does not answer, so there is no {what}")
        return self._connection

    async def _is_broken(self, connection: libvirt.virConnect, error: libvirt.libvirtError) -> bool:
        if error.get_error_domain() == libvirt.VIR_FROM_RPC or error.get_error_code() in _BROKEN:
            return True

        def alive() -> bool:
            try:
                return bool(connection.isAlive())
            except libvirt.libvirtError:
                return False

        try:
            return not await self._run(alive, CALL_TIMEOUT)
        except TimeoutError:
            return True

    def _lost(self, connection: libvirt.virConnect) -> None:
        """Begin to reconnect, once for each connection."""
        if connection is not self._connection:
            return
        self._connection = None
        self._up.clear()
        log.warning("libvirt went away", uri=self.uri)
        self._scope.start(self._reconnect(connection), "reconnect")

    async def _reconnect(self, broken: libvirt.virConnect) -> None:
        with contextlib.suppress(TimeoutError):
            await self._run(lambda: self._let_go(broken), CALL_TIMEOUT)
        pause = FIRST_PAUSE
        while True:
            try:
                await self._connect()
            except HypervisorError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, LAST_PAUSE)
                continue
            log.info("libvirt is back", uri=self.uri)
            for uuid in list(self._listeners):
                self._dispatch(uuid, Event(RECONNECTED))
            return

    async def _connect(self) -> None:
        def connect() -> libvirt.virConnect:
            connection = libvirt.open(self.uri)
            try:
                if (version := connection.getLibVersion()) < LEAST_VERSION:
                    found, wanted = readable(version), readable(LEAST_VERSION)
                    raise HypervisorError(f"libvirt {found} at {self.uri} is too old: {wanted} is the least")
                with contextlib.suppress(
                    libvirt.libvirtError
                ):  # the driver inside the process has no connection to lose
                    connection.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_MISSED)
                    connection.registerCloseCallback(lambda *_: self._closed(connection), None)
                self._callback = libvirt_qemu.qemuMonitorEventRegister(connection, None, None, self._event, None)
            except BaseException:
                connection.close()
                raise
            return connection

        self.since = self._loop.time()
        try:
            self._connection = await self._run(connect, CALL_TIMEOUT)
        except libvirt.libvirtError as error:
            raise HypervisorError(f"libvirt ({self.uri}) does not answer: {error}") from error
        except TimeoutError:
            raise HypervisorError(f"libvirt ({self.uri}) does not answer within {CALL_TIMEOUT:g} s") from None
        self._up.set()

    def _let_go(self, connection: libvirt.virConnect) -> None:
        for step in (
            lambda: libvirt_qemu.qemuMonitorEventDeregister(connection, self._callback),
            connection.unregisterCloseCallback,
            connection.close,
        ):
            with contextlib.suppress(libvirt.libvirtError):
                step()

    def _closed(self, connection: libvirt.virConnect) -> None:
        """In libvirt's thread: the connection broke."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._lost, connection)

    def _event(
        self,
        connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        name: str,
        seconds: int,
        micros: int,
        details: str | None,
        opaque: object,
    ) -> None:
        """In libvirt's thread: QEMU said something."""
        uuid = domain.UUIDString()
        event = Event(name, _object(details), {"seconds": seconds, "microseconds": micros})
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._dispatch, uuid, event)

    def _dispatch(self, uuid: str, event: Event) -> None:
        for listener in list(self._listeners.get(uuid, [])):
            listener(event)

    async def _run(self, function: Callable[[], T], timeout: float) -> T:
        """Run in a thread.

        Raises:
            TimeoutError: It is still running; its result will be nobody's.
        """
        future = _in_thread(function)
        deadline = self._loop.time() + timeout
        cancelled: asyncio.CancelledError | None = None
        while not future.done() and (left := deadline - self._loop.time()) > 0:
            try:
                await asyncio.wait({future}, timeout=left)
            except asyncio.CancelledError as error:
                cancelled = error
        if not future.done():
            future.add_done_callback(_seen)
        if cancelled is not None:
            _seen(future)
            raise cancelled
        if not future.done():
            raise TimeoutError
        return future.result()


def _object(details: str | None) -> dict[str, Any]:
    """Read an event's details."""
    try:
        data = json.loads(details or "{}")
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run in a thread of its own, which no one waits for at the end of the process.

    A QEMU that hangs keeps the call that waits for it, and neither the calls for other VMs nor the daemon's exit.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=work, name="libvirt-call", daemon=True).start()
    return asyncio.wrap_future(outcome)


def _seen(future: asyncio.Future[Any]) -> None:
    if future.done() and not future.cancelled():
        future.exception()
