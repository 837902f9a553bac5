"""What the containers of a fake guest run: coroutines that write, wait and return an exit code.

There is a shell that knows the few words which tests of a real guest with BusyBox use too: commands one after another
(`;`), `echo` with `>&2`, `exit`, `sleep`, `trap 'exit N' TERM`, `wait`, and whatever else is a program here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shlex
from collections.abc import Awaitable, Callable
from pathlib import PurePosixPath
from typing import Protocol

SYNTAX_ERROR = 2


class Sink(Protocol):
    """Where a process's output goes."""

    async def write(self, data: bytes, *, stderr: bool) -> None:
        """Take bytes; waits while the reader is behind."""


@dataclasses.dataclass
class Process:
    """A process of a fake guest.

    Attributes:
        stdin: What it may read; an empty chunk is the end.
        handlers: Exit code by signal number, for signals the program handles.
    """

    argv: list[str]
    sink: Sink
    uid: int
    hostname: str
    stdin: asyncio.Queue[bytes] = dataclasses.field(default_factory=asyncio.Queue)
    handlers: dict[int, int] = dataclasses.field(default_factory=dict)

    async def write(self, text: str, *, stderr: bool = False) -> None:
        """Write text."""
        await self.sink.write(text.encode(), stderr=stderr)


Program = Callable[[Process], Awaitable[int]]


async def echo(process: Process) -> int:
    """Write the arguments and a newline."""
    await process.write(" ".join(process.argv[1:]) + "\n")
    return 0


async def sleep(process: Process) -> int:
    """Do nothing for so many seconds."""
    await asyncio.sleep(float(process.argv[1]))
    return 0


async def true(process: Process) -> int:
    """Succeed."""
    return 0


async def false(process: Process) -> int:
    """Fail."""
    return 1


async def hostname(process: Process) -> int:
    """Write the host's name."""
    await process.write(f"{process.hostname}\n")
    return 0


async def identity(process: Process) -> int:
    """Write the user's number, as `id -u` does."""
    await process.write(f"{process.uid}\n")
    return 0


async def cat(process: Process) -> int:
    """Write what is read."""
    while data := await process.stdin.get():
        await process.sink.write(data, stderr=False)
    return 0


async def shell(process: Process) -> int:
    """Run `sh -c SCRIPT`."""
    if len(process.argv) < 3 or process.argv[1] != "-c":
        return SYNTAX_ERROR
    status = 0
    for command in _commands(process.argv[2]):
        if command == ["exit"]:
            return status
        if command[0] == "exit":
            return int(command[1])
        status = await _run(process, command)
    return status


PROGRAMS: dict[str, Program] = {
    "cat": cat,
    "echo": echo,
    "sleep": sleep,
    "true": true,
    "false": false,
    "hostname": hostname,
    "id": identity,
    "sh": shell,
}


def find(programs: dict[str, Program], name: str) -> Program | None:
    """Return a program by name or path; a name without a path is looked for in /bin."""
    path = PurePosixPath(name)
    if path.parent not in (PurePosixPath("."), PurePosixPath("/bin")):
        return None
    return programs.get(path.name)


def _commands(script: str) -> list[list[str]]:
    lexer = shlex.shlex(script.replace("\n", ";"), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for token in lexer:
        if token in (";", "&"):
            commands.append([])
        else:
            commands[-1].append(token)
    return [command for command in commands if command]


async def _run(process: Process, command: list[str]) -> int:
    if command[0] == "trap":  # trap 'exit N' TERM
        process.handlers[{"TERM": 15, "INT": 2, "HUP": 1}[command[2]]] = int(command[1].split()[1])
        return 0
    if command[0] == "wait":
        await asyncio.Event().wait()
    to_stderr = command[-2:] == [">&", "2"]
    sink = _Redirected(process.sink) if to_stderr else process.sink
    argv = command[:-2] if to_stderr else command
    program = find(PROGRAMS, argv[0])
    if program is None:
        await process.write(f"sh: {argv[0]}: not found\n", stderr=True)
        return 127
    return await program(dataclasses.replace(process, argv=argv, sink=sink))


class _Redirected:
    """Standard output sent to standard error."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    async def write(self, data: bytes, *, stderr: bool) -> None:
        await self._sink.write(data, stderr=True)
