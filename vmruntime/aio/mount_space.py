"""Mounts that nobody else sees and that end with the block that wants them, or with the daemon (mount_namespaces(7))."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from vmruntime.aio.process import STDERR_LIMIT, last_lines
from vmruntime.errors import DeadlineExceeded, FailedPrecondition


class MountFailed(FailedPrecondition):
    """Raised when what should be mounted cannot be; the message is the program's."""


# The holder ends when the daemon closes the pipe, by whatever way, and its mounts with it.
_SCRIPT = '"$@" >&2 && echo mounted && read -r _'


@contextlib.asynccontextmanager
async def mount_space(command: Sequence[str], *, timeout: float = 60.0) -> AsyncIterator[Path]:
    """Run a command such as mount(8) in a mount namespace of its own; yield the path to its root directory.

    Links in what is mounted are not to be followed: they lead into the host's own files.

    Args:
        command: Program and arguments.
        timeout: Seconds for the command.

    Raises:
        MountFailed: The command failed.
        FailedPrecondition: unshare is not installed.
        DeadlineExceeded: It did not finish in time.
    """
    try:
        holder = await asyncio.create_subprocess_exec(
            *["unshare", "--mount", "--propagation=private", "--", "/bin/sh", "-c", _SCRIPT, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise FailedPrecondition("the program 'unshare' is not installed", remedy="install util-linux") from None
    try:
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            async with asyncio.timeout(timeout):
                if not await holder.stdout.readline():
                    words = (await holder.stderr.read(STDERR_LIMIT)).decode(errors="replace")
                    raise MountFailed(last_lines(words))
        except TimeoutError:
            raise DeadlineExceeded(f"{command[0]} did not finish within {timeout:g} s") from None
        yield Path(f"/proc/{holder.pid}/root")
    finally:
        with contextlib.suppress(ProcessLookupError):
            holder.kill()
        await asyncio.shield(holder.wait())
