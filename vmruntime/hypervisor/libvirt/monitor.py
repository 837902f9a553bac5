"""QMP through libvirt: what libvirt itself has no words for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from vmruntime.hypervisor.errors import HypervisorError, VmGone
from vmruntime.hypervisor.libvirt.binding import libvirt, libvirt_qemu
from vmruntime.hypervisor.libvirt.connection import Connection, Event

COMMAND_TIMEOUT = 20.0
_GONE = frozenset({libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_OPERATION_FAILED})


class Monitor:
    """The monitor of one domain. Commands are sent one at a time, so one that hangs keeps one thread and no more."""

    def __init__(self, connection: Connection, uuid: str) -> None:
        self._connection = connection
        self._uuid = uuid
        self._turn = asyncio.Lock()
        self._closed = False

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run one command and return its answer.

        Raises:
            HypervisorError: QEMU refused, with its words; or libvirt does not answer.
            VmGone: The domain does not run.
        """
        return await self._execute(command, arguments, ())

    async def execute_with_fd(self, command: str, arguments: dict[str, Any], fd: int) -> Any:
        """Run one command that takes a descriptor; the descriptor stays the caller's."""
        try:
            copy = os.dup(fd)  # the caller may be gone, and its descriptor closed, before a call that hangs is over
        except OSError as error:
            raise HypervisorError(f"no descriptor for {command}: {error.strerror}") from error
        return await self._execute(command, arguments, (copy,))

    async def events(self, *names: str) -> AsyncIterator[dict[str, Any]]:
        """Iterate over events of these names."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        with self._connection.listening(self._uuid, queue.put_nowait):
            while True:
                event = await queue.get()
                if event.name in names:
                    yield {"event": event.name, "data": event.data, "timestamp": event.timestamp}

    @contextlib.contextmanager
    def listen_deleted(self, device: str) -> Iterator[Callable[[float], Awaitable[bool]]]:
        """Listen from now on for the end of one device; the value waits for it, at most so many seconds."""
        gone = asyncio.Event()

        def listen(event: Event) -> None:
            if event.name == "DEVICE_DELETED" and event.data.get("device") == device:
                gone.set()

        async def deleted(timeout: float) -> bool:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await gone.wait()
            return gone.is_set()

        with self._connection.listening(self._uuid, listen):
            yield deleted

    async def close(self) -> None:
        """Take no more commands."""
        self._closed = True

    async def _execute(self, command: str, arguments: dict[str, Any] | None, fds: Sequence[int]) -> Any:
        sent: list[bool] = []

        def execute(connection: libvirt.virConnect) -> str:
            sent.append(True)
            try:
                domain = connection.lookupByUUIDString(self._uuid)
                request = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
                if not fds:
                    return str(libvirt_qemu.qemuMonitorCommand(domain, request, 0))
                answer, _ = libvirt_qemu.qemuMonitorCommandWithFiles(domain, request, list(fds), 0)
                return str(answer)
            finally:
                for fd in fds:
                    os.close(fd)

        try:
            async with self._turn:
                if self._closed:
                    raise VmGone("the VM was let go of")
                repeatable = command.startswith(("query-", "qom-get", "qom-list"))
                answer = json.loads(
                    await self._connection.call(
                        execute, what=command, timeout=COMMAND_TIMEOUT, repeatable=repeatable and not fds
                    )
                )
        except libvirt.libvirtError as error:
            if error.get_error_code() in _GONE:
                raise VmGone(f"the VM is gone: {error}") from error
            raise HypervisorError(f"libvirt refused {command}: {error}") from error
        finally:
            if not sent:
                for fd in fds:
                    os.close(fd)
        if "error" in answer:
            raise HypervisorError(f"QEMU refused {command}: {answer['error'].get('desc', 'it does not say why')}")
        return answer.get("return")
