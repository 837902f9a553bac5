"""What a guest can be asked through its QEMU guest agent."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vmruntime.errors import DeadlineExceeded, InvalidArgument
from vmruntime.qga import answers
from vmruntime.qga.answers import OUTPUT_LIMIT, ExecResult, GuestFilesystem, GuestInfo, GuestInterface
from vmruntime.qga.channel import Channel
from vmruntime.qga.errors import QgaError, QgaNotStarted, QgaSilent, QgaUnsupported

TIMEOUT = 10.0
"""Seconds for a command that is answered at once, in a guest that has much to do."""

INPUT_LIMIT = 4 * 1024 * 1024
"""Bytes of stdin. They go through the channel as one document, which qemu-ga holds several times over."""

ARGUMENTS_LIMIT = 2 * 1024 * 1024  # of execve(2), usually

SHUTDOWN_GRACE = 1.0
KILL_TIMEOUT = 5.0

# Seconds between questions whether a process has ended: quick ones are seen at once, slow ones do not keep the agent busy.
_FIRST_POLL, _LONGEST_POLL, _GROWTH = 0.01, 0.5, 1.5

_STATUS_SLACK = 64 * 1024

_CANNOT_START = "Failed to execute child process"  # GLib's g_spawn_async_with_pipes(); qemu-ga sets no locale
_NO_SUCH_FILE = "No such file or directory"


class GuestAgent:
    """A guest agent on a channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._info: GuestInfo | None = None

    @property
    def closed(self) -> bool:
        """Whether the channel is known to have ended."""
        return self._channel.closed

    async def close(self) -> None:
        """Let go of the channel."""
        await self._channel.close()

    async def ping(self, timeout: float = TIMEOUT) -> None:
        """Return when the agent answers.

        Raises:
            QgaSilent: It does not in time.
            QgaGone, QgaLied: See Channel.call().
        """
        await self._channel.call("guest-ping", timeout=timeout)

    async def wait(self, timeout: float) -> None:
        """Wait for an agent to come up, asking now and then: what a guest without one is asked gets lost.

        Raises:
            QgaSilent: None came in time.
            QgaGone, QgaLied: See Channel.call().
        """
        loop = asyncio.get_running_loop()
        end, attempt = loop.time() + timeout, 0.25
        while True:
            left = end - loop.time()
            try:
                return await self.ping(max(0.01, min(attempt, left)))
            except QgaSilent:
                if left <= attempt:
                    raise QgaSilent("guest-ping", timeout) from None
            attempt = min(2 * attempt, 5.0)

    async def info(self) -> GuestInfo:
        """Return the agent's version and commands, asked once."""
        if self._info is None:
            self._info = answers.info(await self._channel.call("guest-info", timeout=TIMEOUT))
        return self._info

    async def interfaces(self) -> list[GuestInterface]:
        """Return the guest's network interfaces.

        Raises:
            QgaError: The agent cannot tell them, does not answer, or lies.
        """
        return answers.interfaces(await self._channel.call("guest-network-get-interfaces", timeout=TIMEOUT))

    async def filesystems(self) -> list[GuestFilesystem]:
        """Return the guest's mounted file systems.

        Raises:
            QgaError: The agent cannot tell them, does not answer, or lies.
        """
        return answers.filesystems(await self._channel.call("guest-get-fsinfo", timeout=TIMEOUT))

    async def shutdown(self, mode: Literal["powerdown", "halt", "reboot"] = "powerdown") -> None:
        """Ask the guest to shut down; that it does is seen at the VM.

        Raises:
            QgaError: The agent refuses, or cannot be asked.
        """
        await self._channel.tell("guest-shutdown", {"mode": mode}, timeout=TIMEOUT, grace=SHUTDOWN_GRACE)

    async def bring_online(self) -> int | None:
        """Have the guest use the processors and memory that it has and does not use.

        Returns:
            How many processors it has noticed; None: its agent does not tell.

        Raises:
            QgaError: The agent refuses, does not answer, or lies.
        """
        known = (await self.info()).commands
        count = None
        if {"guest-get-vcpus", "guest-set-vcpus"} <= known:
            count, offline = answers.vcpus(await self._channel.call("guest-get-vcpus", timeout=TIMEOUT))
            if offline:
                vcpus = [{"logical-id": one, "online": True} for one in offline]
                await self._channel.call("guest-set-vcpus", {"vcpus": vcpus}, timeout=TIMEOUT)
        if {"guest-get-memory-blocks", "guest-set-memory-blocks"} <= known:
            missing = answers.offline_blocks(await self._channel.call("guest-get-memory-blocks", timeout=TIMEOUT))
            if missing:
                blocks = [{"phys-index": one, "online": True} for one in missing]
                await self._channel.call("guest-set-memory-blocks", {"mem-blks": blocks}, timeout=TIMEOUT)
        return count

    async def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float | None,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        output_limit: int = OUTPUT_LIMIT,
    ) -> ExecResult:
        """Run a program in the guest to its end and return its output.

        It runs as the agent does, as root. When the time is up, or the caller is cancelled, it is killed; its children
        are not.

        Args:
            argv: Program, looked for in the agent's PATH, and arguments.
            timeout: Seconds; None: as long as it takes.
            env: The whole environment; None: the agent's.
            stdin: Its input.
            output_limit: Bytes of stdout and of stderr that are kept.

        Raises:
            DeadlineExceeded: It ran longer than `timeout`.
            QgaUnsupported: The agent is not to run programs.
            QgaNotStarted: It cannot start the program.
            QgaError: It does not answer, or lies.
            InvalidArgument: Input or arguments are larger than can be passed.
        """
        request = _exec_request(argv, env, stdin)
        for command in ("guest-exec", "guest-exec-status"):
            await self._demand(command)
        pid = await self._start(request)
        try:
            async with asyncio.timeout(timeout):
                return await self._ended(pid, output_limit)
        except TimeoutError:
            await self._kill(pid)
            raise DeadlineExceeded(f"{argv[0]} did not finish within {timeout or 0:g} s in the guest") from None
        except asyncio.CancelledError:
            await self._kill(pid)
            raise

    async def _demand(self, command: str) -> None:
        """Raise QgaUnsupported when the agent does not obey a command; asked anew, since it may be another one by now."""
        if command not in (await self.info()).commands:
            self._info = None
            if command not in (await self.info()).commands:
                raise QgaUnsupported(command)

    async def _start(self, request: dict[str, Any]) -> int:
        """Start a program; return its pid. A caller that is cancelled meanwhile waits for it, and it is killed."""
        call = asyncio.ensure_future(self._channel.call("guest-exec", request, timeout=TIMEOUT))
        try:
            return answers.pid(await asyncio.shield(call))
        except asyncio.CancelledError:
            await asyncio.wait([call])
            with contextlib.suppress(QgaError):
                await self._kill(answers.pid(call.result()))
            raise
        except QgaError as error:
            raise _not_started(error) or error from None

    async def _ended(self, pid: int, output_limit: int) -> ExecResult:
        pause = _FIRST_POLL
        # Both outputs in base64, which makes four bytes of three.
        limit = 2 * (4 * OUTPUT_LIMIT // 3) + _STATUS_SLACK
        while True:
            status = await self._channel.call("guest-exec-status", {"pid": pid}, timeout=TIMEOUT, limit=limit)
            found = answers.exec_status(status, output_limit)
            if found is not None:
                return found
            await asyncio.sleep(pause)
            pause = min(pause * _GROWTH, _LONGEST_POLL)

    async def _kill(self, pid: int) -> None:
        """End a process, as well as it can be done, and collect its status: the agent keeps it until it is asked for."""
        with contextlib.suppress(QgaError, TimeoutError):
            async with asyncio.timeout(KILL_TIMEOUT):
                kill: dict[str, Any] = {"path": "kill", "arg": ["-KILL", str(pid)]}
                killer = answers.pid(await self._channel.call("guest-exec", kill, timeout=KILL_TIMEOUT))
                for one in (killer, pid):
                    await self._ended(one, 0)


def _not_started(error: QgaError) -> QgaNotStarted | None:
    """Return a refusal of guest-exec as what it is when it is about the program; else None."""
    if type(error) is not QgaError or _CANNOT_START not in error.message:
        return None
    return QgaNotStarted(error.message, missing=_NO_SUCH_FILE in error.message)


def _exec_request(argv: Sequence[str], env: Mapping[str, str] | None, stdin: bytes) -> dict[str, Any]:
    if not argv or not argv[0]:
        raise InvalidArgument("there is no program to run in the guest", remedy="name one")
    if len(stdin) > INPUT_LIMIT:
        raise InvalidArgument(
            f"the input has {len(stdin)} bytes; {INPUT_LIMIT} can be passed through the QEMU guest agent",
            remedy="use ssh, or a volume",
        )
    variables = [f"{name}={value}" for name, value in (env or {}).items()]
    size = sum(len(word.encode()) + 1 for word in (*argv, *variables))
    if size > ARGUMENTS_LIMIT or any("\0" in word for word in (*argv, *variables)):
        raise InvalidArgument(f"the arguments have a NUL character, or more than {ARGUMENTS_LIMIT} bytes")
    request: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
    if env is not None:
        request["env"] = variables
    if stdin:
        request["input-data"] = base64.b64encode(stdin).decode()
    return request
