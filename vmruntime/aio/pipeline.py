"""Streams between a thread and a helper program: what is too much to hold in memory."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from vmruntime.aio import process
from vmruntime.errors import FailedPrecondition, Internal

T = TypeVar("T")

# The largest pipe an unprivileged user may have by default (pipe(7), pipe-max-size).
PIPE_SIZE = 1024 * 1024


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


async def feed(
    argv: Sequence[str], chunks: Callable[[], Iterator[bytes]], *, env: Mapping[str, str] | None = None
) -> process.Completed:
    """Run a program and write to its stdin what an iterator gives; its stdout is discarded.

    The iterator runs in a thread and is run to its end even if the program stops reading early. An error it
    raises kills the program and is raised here; a cancelled caller waits until both are gone.

    Args:
        argv: Program and arguments; no shell.
        chunks: Makes the iterator; called in the thread.
        env: The whole environment; None inherits the daemon's.

    Raises:
        FailedPrecondition: The program is not installed.
    """
    reader, writer = os.pipe()
    try:
        with contextlib.suppress(OSError):  # a limit of the host; a small pipe is only slower
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        program = await _start(argv, reader, env)
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)  # the program's copy is the last one: when it ends, a blocked write gets EPIPE
    stop = threading.Event()
    pump = asyncio.ensure_future(asyncio.to_thread(_pump, writer, chunks, stop))
    assert program.stderr is not None
    messages = asyncio.ensure_future(_tail(program.stderr))
    try:
        await asyncio.shield(pump)  # its error comes first: it is the cause of the program's
        stderr = await asyncio.shield(messages)
        returncode = await program.wait()
    finally:
        stop.set()
        if program.returncode is None:
            program.kill()
        await asyncio.shield(program.wait())
        await _settle(pump)
        await _settle(messages)
    return process.Completed(tuple(argv), returncode, b"", stderr.decode(errors="replace"))


async def _start(argv: Sequence[str], stdin: int, env: Mapping[str, str] | None) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise FailedPrecondition(
            f"the program {argv[0]!r} is not installed", remedy="vmruntime doctor says which package has it"
        ) from error


async def _tail(stream: asyncio.StreamReader) -> bytes:
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk
        del kept[: -process.STDERR_LIMIT]
    return bytes(kept)


def _pump(writer: int, chunks: Callable[[], Iterator[bytes]], stop: threading.Event) -> None:
    wanted = True
    with open(writer, "wb", buffering=0) as pipe, contextlib.closing(_generator(chunks())) as source:
        for chunk in source:
            if stop.is_set():
                return
            if wanted:
                wanted = _write(pipe.fileno(), chunk)


def _write(descriptor: int, chunk: bytes) -> bool:
    """Write all of a chunk; False when nobody reads any more."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError:
        return False
    return True


def _generator(chunks: Iterator[bytes]) -> Generator[bytes, None, None]:
    """Make sure that there is something to close."""
    yield from chunks


def output_of(argv: Sequence[str], source: Path, block: int = 1 << 20) -> Iterator[bytes]:
    """Yield what a filter program makes of a file. For use in a thread: it blocks.

    Raises:
        FailedPrecondition: The program is not installed.
        Internal: It failed; the message has its last words.
    """
    try:
        with open(source, "rb") as file:
            program = subprocess.Popen(
                argv, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
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
