"""Exec and attach as a person wants them: with this terminal, its size, and the keys that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence

import click

from vmruntime.cli import terminal
from vmruntime.cli.client import Client
from vmruntime.cli.sessions import Detached, Ends, converse, tls_context
from vmruntime.config.settings import StreamingSettings
from vmruntime.errors import DeadlineExceeded
from vmruntime.generated import cri_pb2


def run_command(
    client: Client,
    settings: StreamingSettings,
    container_id: str,
    argv: tuple[str, ...],
    *,
    stdin: bool,
    tty: bool,
    timeout: float = 0.0,
) -> int:
    """Run a command in a container, joined to this side's streams; return its exit status.

    Raises:
        DeadlineExceeded: It was killed after `timeout` seconds; 0: none.
    """
    request = cri_pb2.ExecRequest(
        container_id=container_id, cmd=argv, stdin=stdin, tty=tty, stdout=True, stderr=not tty
    )
    url = client.call(client.runtime.Exec, request).url

    async def session() -> int:
        async with asyncio.timeout(timeout or None):
            return await converse(url, _ends(stdin=stdin, tty=tty), tls_context(settings))

    with _terminal(tty=tty):
        try:
            return asyncio.run(session())
        except TimeoutError:
            raise DeadlineExceeded(f"the command {argv[0]!r} was killed after {timeout:g} s, its time-out") from None


def join_container(
    client: Client,
    settings: StreamingSettings,
    container_id: str,
    *,
    stdin: bool,
    tty: bool,
    console: bool = False,
    ready: Callable[[], None] | None = None,
    watch: Callable[[], None] | None = None,
) -> bool:
    """Join a container's streams to this side's until it ends; return False when the user left it running.

    Args:
        client: The daemon.
        settings: How its streams are served.
        container_id: Which container.
        stdin: Whether it gets this side's input.
        tty: Whether it has a terminal.
        console: Whether that is the serial console of a VM, which Ctrl-] leaves, too.
        ready: Called once when nothing of what it writes from now on will be missed.
        watch: Called some ten times a second; what it raises ends this.
    """
    request = cri_pb2.AttachRequest(container_id=container_id, stdin=stdin, tty=tty, stdout=True, stderr=not tty)
    url = client.call(client.runtime.Attach, request).url
    leave = () if not tty else terminal.CONSOLE_KEYS if console else terminal.DETACH_KEYS
    ends = _ends(stdin=stdin, tty=tty, leave=leave, ready=_threaded(ready), watch=_repeated(watch))
    try:
        with _terminal(tty=tty):
            asyncio.run(_to_the_end(url, ends, settings))
    except Detached:
        click.echo(f"\nvmruntime: left; the {'VM' if console else 'container'} goes on", err=True)
        return False
    return True


def container_streams(client: Client, container_id: str) -> tuple[bool, bool]:
    """Return whether a container has stdin, and a terminal."""
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    info = client.call(client.runtime.ContainerStatus, request).info
    known = json.loads(info.get("info") or "{}")
    return bool(known.get("stdin")), bool(known.get("tty"))


async def _to_the_end(url: str, ends: Ends, settings: StreamingSettings) -> int:
    return await converse(url, ends, tls_context(settings))


def _ends(
    *,
    stdin: bool,
    tty: bool,
    leave: Sequence[bytes] = (),
    ready: Callable[[], Awaitable[None]] | None = None,
    watch: Callable[[], Awaitable[None]] | None = None,
) -> Ends:
    stdout, stderr = terminal.outputs()
    return Ends(
        stdout=stdout,
        stderr=stderr,
        stdin=terminal.read_stdin(leave=leave) if stdin else None,
        sizes=terminal.sizes() if tty and terminal.is_terminal() else None,
        ready=ready,
        watch=watch,
    )


def _terminal(*, tty: bool) -> contextlib.AbstractContextManager[None]:
    return terminal.raw() if tty else contextlib.nullcontext()


def _threaded(work: Callable[[], None] | None) -> Callable[[], Awaitable[None]] | None:
    if work is None:
        return None
    return lambda: asyncio.to_thread(work)


def _repeated(check: Callable[[], None] | None) -> Callable[[], Awaitable[None]] | None:
    if check is None:
        return None

    async def repeat() -> None:
        while True:
            await asyncio.sleep(0.1)
            check()

    return repeat
