"""Helper programs that live as long as one call."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmruntime.errors import DeadlineExceeded, FailedPrecondition, Internal

STDERR_LIMIT = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Completed:
    """A program that has ended.

    Attributes:
        returncode: Exit status; negative: the signal that ended it.
        stderr: The last 64 KiB, undecodable bytes replaced.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: str

    def check(self) -> Completed:
        """Return self, or raise Internal naming the program, its status and its last words."""
        if self.returncode != 0:
            raise Internal(f"{self.argv[0]} failed with status {self.returncode}: {last_lines(self.stderr)}")
        return self


def last_lines(text: str, limit: int = 500) -> str:
    """Return the end of a program's messages, short enough for an error."""
    text = text.strip()
    return text if len(text) <= limit else "…" + text[-limit:]


async def run(
    argv: Sequence[str],
    *,
    input: bytes = b"",
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output_limit: int = 16 * 1024 * 1024,
    pass_fds: Sequence[int] = (),
    die_with_us: bool = False,
    awaited: bool = False,
) -> Completed:
    """Run a program to its end in a process group of its own and return what it said.

    The program is killed, with its children, when the time is up or the caller is cancelled.

    Args:
        argv: Program and arguments; no shell.
        input: Bytes for its stdin.
        timeout: Seconds.
        env: The whole environment; None inherits the daemon's.
        cwd: Working directory.
        output_limit: Bytes of stdout; more is an error.
        pass_fds: Descriptors the program inherits under the same numbers.
        die_with_us: The kernel kills it if we are killed (prctl(2), PR_SET_PDEATHSIG); for what may take long.
        awaited: It works for milliseconds while a pod waits for it, so it shares our session's part of the processors. In
            a session of its own, as all others are lest they take ours, it would first wait behind all others on a busy
            host (sched(7), autogroup).

    Raises:
        FailedPrecondition: The program is not installed.
        DeadlineExceeded: It ran longer than `timeout`.
        Internal: It wrote more than `output_limit`.
    """
    command = list(argv)
    if die_with_us:
        # Looked for here, because setpriv would say in its own words that it is missing.
        program = shutil.which(argv[0], path=_path(env))
        if program is None:
            raise _not_installed(argv[0])
        command = ["setpriv", "--pdeathsig", "KILL", "--", program, *argv[1:]]
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE if input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=not awaited,
            process_group=0 if awaited else None,
            pass_fds=pass_fds,
        )
    except FileNotFoundError as error:
        raise _not_installed(command[0]) from error
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await _communicate(process, input, output_limit)
            returncode = await process.wait()
    except TimeoutError:
        raise DeadlineExceeded(f"{argv[0]} did not finish within {timeout:g} s") from None
    finally:
        if process.returncode is None:
            _kill_group(process.pid)
            await asyncio.shield(process.wait())
    if len(stdout) > output_limit:
        raise Internal(f"{argv[0]} wrote more than {output_limit} bytes")
    return Completed(tuple(argv), returncode, stdout, stderr.decode(errors="replace"))


def _path(env: Mapping[str, str] | None) -> str | None:
    return None if env is None else env.get("PATH", os.defpath)


def _not_installed(program: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the program {program!r} is not installed", remedy="vmruntime doctor says which package has it"
    )


async def _communicate(process: asyncio.subprocess.Process, data: bytes, limit: int) -> tuple[bytes, bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.TaskGroup() as group:
        if data:
            group.create_task(_feed(process, data))
        out = group.create_task(_read_head(process.stdout, limit + 1))
        err = group.create_task(_read_tail(process.stderr, STDERR_LIMIT))
    return out.result(), err.result()


async def _feed(process: asyncio.subprocess.Process, data: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(data)
        await process.stdin.drain()
        process.stdin.close()
    except (BrokenPipeError, ConnectionResetError):
        pass  # it did not want all of it; its status says whether that was a failure


async def _read_head(stream: asyncio.StreamReader, limit: int) -> bytes:
    """Read to the end, keeping the first `limit` bytes."""
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk[: max(0, limit - len(kept))]
    return bytes(kept)


async def _read_tail(stream: asyncio.StreamReader, limit: int) -> bytes:
    """Read to the end, keeping the last `limit` bytes."""
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk
        del kept[:-limit]
    return bytes(kept)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
