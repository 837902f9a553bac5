"""Blocking calls beside the event loop, and what a helper program makes of a file that is too much to hold in memory."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeVar

from vmruntime.aio import process
from vmruntime.errors import FailedPrecondition, Internal

T = TypeVar("T")


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking call in a thread; a cancelled caller still waits until the call is over.

    So whoever cleans up after the caller finds nothing at work any more.
    """
    future = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await _settle(future)
        raise


def output_of(argv: Sequence[str], source: BinaryIO, block: int = 1 << 20) -> Iterator[bytes]:
    """Yield what a filter program makes of an open file, from where it is. For use in a thread: it blocks.

    Raises:
        FailedPrecondition: The program is not installed.
        Internal: It failed; the message has its last words.
    """
    try:
        program = subprocess.Popen(
            argv, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except FileNotFoundError as error:
        raise FailedPrecondition(f"the program {argv[0]!r} is not installed") from error
    with program:
        assert program.stdout is not None
        assert program.stderr is not None
        try:
            while chunk := program.stdout.read(block):
                yield chunk
            # A filter says little: its messages fit into the pipe, so reading them last cannot block it.
            message = program.stderr.read(process.STDERR_LIMIT).decode(errors="replace")
        finally:
            if program.poll() is None and not program.stdout.closed:
                _finish(program)
    if program.returncode != 0:
        raise Internal(f"{argv[0]} failed with status {program.returncode}: {process.last_lines(message)}")


def _finish(program: subprocess.Popen[bytes]) -> None:
    """Give a program that closed its output a moment to end; kill one that was left in the middle."""
    try:
        program.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        program.kill()


async def _settle(future: asyncio.Future[T]) -> None:
    """Wait until a future is done, whatever its outcome, and count its error as seen."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    if not future.cancelled():
        future.exception()
