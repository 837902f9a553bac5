"""A guest frozen and brought back: everything of QEMU's state but the guest's memory, which is in a file of its own.

QEMU calls it a migration that ignores shared memory (the capability x-ignore-shared, qemu-qmp-ref(7)). The stream goes through
a socket pair: a QEMU in its sandbox opens no file, and newer ones take no file by descriptor.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.qemu.monitor import Monitor

STREAM = "state"
LARGEST_STATE = 64 * 1024 * 1024
FREEZE_SECONDS = 30.0
BALLOON_SECONDS = 20.0
SETTLED_SECONDS = 2.5
"""After which a balloon that has not grown is as large as the guest can make it. QEMU tells of it once a second at most."""

KEPT_MIB = 32
MIB = 1024 * 1024
NextEvent = Callable[[], Awaitable[Any]]
CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]


async def freeze(monitor: Monitor) -> bytes:
    """Stop a guest for good and return its state without its memory.

    Raises:
        HypervisorError: QEMU refused or did not finish.
    """
    await monitor.execute("stop")
    async with _migration(monitor, "migrate") as (stream, next_event), _within("freeze"):
        state = await _read(stream)
        await _finished(next_event)
    return state


async def thaw(monitor: Monitor, state: bytes) -> None:
    """Give a QEMU that was started with -incoming defer the state of a frozen guest; the guest stays stopped.

    Raises:
        HypervisorError: The state is not of such a machine, or is damaged.
    """
    async with _migration(monitor, "migrate-incoming") as (stream, next_event), _within("thaw"):
        with contextlib.suppress(OSError):  # it has read enough to know better, and says so below
            await asyncio.get_running_loop().sock_sendall(stream, state)
            stream.shutdown(socket.SHUT_WR)
        await _finished(next_event)


async def give_back(monitor: Monitor, memory_mib: int) -> None:
    """Have a guest give its free memory back to the host, so that it is not part of what is frozen.

    Args:
        monitor: QEMU's.
        memory_mib: The guest's memory.
    """
    with monitor.listening("BALLOON_CHANGE") as next_event:
        await _balloon(monitor, next_event, KEPT_MIB * MIB)
        await _balloon(monitor, next_event, memory_mib * MIB)


async def _balloon(monitor: Monitor, next_event: NextEvent, target: int) -> None:
    """Ask for a size of the guest's memory and wait until it is reached, or no change has come for a while."""
    await monitor.execute("balloon", {"value": target})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BALLOON_SECONDS):
            while True:
                async with asyncio.timeout(SETTLED_SECONDS):
                    event = await next_event()
                if event["data"]["actual"] == target:
                    return


async def _finished(next_event: NextEvent) -> None:
    while True:
        status = (await next_event())["data"]["status"]
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            raise HypervisorError(f"QEMU could not hand the guest over: its migration has {status}")


async def _read(stream: socket.socket) -> bytes:
    loop, state = asyncio.get_running_loop(), bytearray()
    while data := await loop.sock_recv(stream, 256 * 1024):
        state += data
        if len(state) > LARGEST_STATE:
            raise HypervisorError(f"the frozen guest's state is larger than {LARGEST_STATE // MIB} MiB")
    return bytes(state)


@contextlib.asynccontextmanager
async def _migration(monitor: Monitor, command: str) -> AsyncIterator[tuple[socket.socket, NextEvent]]:
    """Begin to hand a guest over; yield our end of the stream, which does not block, and what waits for QEMU's events."""
    await monitor.execute("migrate-set-capabilities", {"capabilities": CAPABILITIES})
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, monitor.listening("MIGRATION") as next_event:
        await monitor.execute_with_fd("getfd", {"fdname": STREAM}, theirs.fileno())
        await monitor.execute(command, {"uri": f"fd:{STREAM}"})
        theirs.close()
        yield ours, next_event


@contextlib.asynccontextmanager
async def _within(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(FREEZE_SECONDS):
            yield
    except TimeoutError:
        raise HypervisorError(f"QEMU did not {what} the guest within {FREEZE_SECONDS:g} s") from None
