"""A VM's screen on a port of this machine: connections there are led to the unix socket that the VM listens on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from vmruntime.aio.beside import together
from vmruntime.aio.tasks import TaskScope
from vmruntime.errors import Unavailable

_CHUNK = 64 * 1024


async def show(
    screen: Path,
    address: str,
    port: int,
    say: Callable[[str, int], None],
    complain: Callable[[str], None],
    viewer: Callable[[str, int], Sequence[str]] | None = None,
) -> int:
    """Listen until this is cancelled or, with a viewer, until that ends; return the viewer's exit status.

    Args:
        screen: The VM's socket.
        address: Where to listen.
        port: The same; 0: any that is free.
        say: Told address and port when connections are accepted.
        complain: Told of connections that lead nowhere.
        viewer: Returns the command of a program that shows it; None: somebody else does.

    Raises:
        Unavailable: Nobody can listen there, or the viewer cannot be started.
    """
    scope = TaskScope("vnc")

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        scope.start(_serve(screen, reader, writer, complain), "viewer", owning=writer.close)

    try:
        server = await asyncio.start_server(accept, address, port)
    except OSError as error:
        raise Unavailable(f"cannot listen on {address} port {port}: {error.strerror or error}") from error
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(scope.close)
        stack.callback(server.close)
        host, bound = server.sockets[0].getsockname()[:2]
        say(host, bound)
        if viewer is None:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")
        return await _run(viewer(host, bound))


async def _run(argv: Sequence[str]) -> int:
    try:
        process = await asyncio.create_subprocess_exec(*argv)
    except OSError as error:
        raise Unavailable(f"cannot start {argv[0]}: {error.strerror}") from error
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _serve(
    screen: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, complain: Callable[[str], None]
) -> None:
    try:
        from_vm, to_vm = await asyncio.open_unix_connection(str(screen))
    except OSError as error:
        complain(f"the VM shows no screen: {error.strerror or error}")
        writer.close()
        return
    try:
        await together(_copy(reader, to_vm), _copy(from_vm, writer))
    except OSError:
        pass  # one side is gone; the other sees its connection end
    finally:
        for end in (to_vm, writer):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        target.write(data)
        await target.drain()
    target.write_eof()
