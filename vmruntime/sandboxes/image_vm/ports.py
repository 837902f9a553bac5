"""The way to a machine's ports: its pod's addresses, from the host."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence

from vmruntime.agent.errors import AgentError
from vmruntime.errors import Code

CHUNK = 64 * 1024
CONNECT_SECONDS = 5.0


class MachinePorts:
    """Connects by TCP; implements agent.interface.PortDialer.

    What listens on the machine's loopback only cannot be reached: nothing of ours runs in there.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        """Take the pod's IP addresses, the one to try first before the others."""
        self._addresses = list(addresses)

    @contextlib.asynccontextmanager
    async def connect(self, port: int) -> AsyncIterator[MachinePort]:
        """Connect to a port.

        Raises:
            AgentError: FAILED_PRECONDITION: nobody listens there, on any address.
        """
        stream = await self._connected(port)
        try:
            yield stream
        finally:
            await stream.close()

    async def _connected(self, port: int) -> MachinePort:
        reasons = []
        for address in self._addresses:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return MachinePort(*await asyncio.open_connection(address, port, limit=CHUNK))
            except TimeoutError:
                reasons.append(f"{address}: no answer within {CONNECT_SECONDS:g} s")
            except OSError as error:
                reasons.append(f"{address}: {_plain(error)}")
        why = "; ".join(reasons) or "the pod has no address"
        raise AgentError(
            f"connect to port {port}: {why} (a program in the machine has to listen on the pod's address, not on"
            " loopback, and its firewall to let it)",
            Code.FAILED_PRECONDITION,
        )


class MachinePort:
    """A connection; implements agent.interface.PortStream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        # write() waits until the kernel has everything, so that leaving loses nothing that was written.
        writer.transport.set_write_buffer_limits(high=0)

    async def read(self) -> AsyncIterator[bytes]:
        """Iterate over what the port sends, to its end; raises AgentError ABORTED when the connection breaks."""
        while True:
            try:
                data = await self._reader.read(CHUNK)
            except OSError as error:
                raise AgentError(_plain(error), Code.ABORTED) from error
            if not data:
                return
            yield data

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the port takes none."""
        with contextlib.suppress(OSError):
            for at in range(0, len(data), CHUNK):
                self._writer.write(data[at : at + CHUNK])
                await self._writer.drain()

    async def close_write(self) -> None:
        """Say that no more bytes come."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    async def close(self) -> None:
        """End the connection."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _plain(error: OSError) -> str:
    """Return the system's words: asyncio has its own, which do not say why."""
    return (os.strerror(error.errno) if error.errno else str(error)).lower()
