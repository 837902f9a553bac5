"""QEMU's monitor, whichever way it is reached."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Monitor(Protocol):
    """The monitor of one VM, by QMP (qemu-qmp-ref(7))."""

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run one command and return its answer.

        Raises:
            HypervisorError: QEMU refused; the message has its words.
            VmGone: There is no QEMU any more.
        """

    async def execute_with_fd(self, command: str, arguments: dict[str, Any], fd: int) -> Any:
        """Run one command that takes a descriptor; the descriptor stays the caller's."""

    def events(self, *names: str) -> AsyncIterator[dict[str, Any]]:
        """Iterate over events of these names."""

    def listen_deleted(self, device: str) -> AbstractContextManager[Callable[[float], Awaitable[bool]]]:
        """Listen from now on for the end of one device; the value waits for it, at most so many seconds."""

    async def close(self) -> None:
        """Let go; the VM goes on."""
