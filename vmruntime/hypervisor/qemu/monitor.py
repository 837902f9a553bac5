"""QMP: one VM's monitor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError

from vmruntime.hypervisor.errors import HypervisorError, VmGone

COMMAND_TIMEOUT = 20.0


class Monitor:
    """A QMP connection. Commands are sent one at a time: a descriptor passed along belongs to the next command."""

    def __init__(self, name: str) -> None:
        self._client = QMPClient(name)
        self._turn = asyncio.Lock()

    async def connect(self, socket: Path) -> None:
        """Connect and negotiate.

        Raises:
            VmGone: Nobody answers on the socket.
        """
        try:
            await self._client.connect(str(socket))
        except (ConnectError, OSError) as error:
            raise VmGone(f"QEMU's monitor {socket} does not answer: {error}") from error

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run one command and return its answer.

        Raises:
            HypervisorError: QEMU refused; the message has its words.
            VmGone: The connection ended.
        """
        async with self._turn:
            return await self._execute(command, arguments)

    async def execute_with_fd(self, command: str, arguments: dict[str, Any], fd: int) -> Any:
        """Run one command that takes a descriptor (SCM_RIGHTS); the descriptor stays the caller's."""
        async with self._turn:
            try:
                self._client.send_fd_scm(fd)
            except (OSError, QMPError, StateError) as error:
                raise VmGone(f"QEMU's monitor is closed: {error}") from error
            return await self._execute(command, arguments)

    async def events(self, *names: str) -> AsyncIterator[dict[str, Any]]:
        """Iterate over events of these names until the connection ends."""
        with self._client.listener(names) as listener:
            async for event in listener:
                yield dict(event)

    @contextlib.contextmanager
    def listening(self, *names: str) -> Iterator[Callable[[], Awaitable[Any]]]:
        """Listen from now on for events of these names; the value waits for the next one."""
        with self._client.listener(names) as listener:
            yield listener.get

    @contextlib.contextmanager
    def listen_deleted(self, device: str) -> Iterator[Callable[[float], Awaitable[bool]]]:
        """Listen from now on for the end of one device; the value waits for it, at most so many seconds."""
        with self._client.listener("DEVICE_DELETED") as listener:

            async def deleted(timeout: float) -> bool:
                try:
                    async with asyncio.timeout(timeout):
                        async for event in listener:
                            data = event.get("data")
                            if isinstance(data, dict) and data.get("device") == device:
                                return True
                except TimeoutError:
                    pass
                return False

            yield deleted

    async def close(self) -> None:
        """Disconnect; the VM goes on."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()

    async def _execute(self, command: str, arguments: dict[str, Any] | None) -> Any:
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise HypervisorError(f"QEMU refused {command}: {error}") from error
        except TimeoutError:
            raise HypervisorError(f"QEMU did not answer {command} within {COMMAND_TIMEOUT:g} s") from None
        except (ExecInterruptedError, StateError, QMPError, OSError) as error:
            raise VmGone(f"QEMU went away during {command}") from error
