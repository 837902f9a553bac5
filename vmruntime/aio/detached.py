"""Processes that outlive the daemon, such as a pod's QEMU.

A detached process is named by pid and start time, so that a pid which the kernel gave to another program is never
mistaken for ours. It is recorded before it exists as itself: a gate (a shell that waits for one line) is forked, its
pid is handed to `record`, and only then does it become the program. If the daemon dies in between, the gate reads
end-of-file and exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import select
import signal
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import FailedPrecondition, Internal

GATE = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "vmruntime-gate")

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked for."""


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A process, beyond doubt: `start_time` is in clock ticks since boot (proc(5), stat field 22)."""

    pid: int
    start_time: int


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None when there is none.

    A zombie counts as gone, since it holds nothing any more, unless it is only the first thread of a process that is being
    killed: then the others still hold everything.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, threads, started = fields[0], int(fields[17]), int(fields[19])
    return None if state in "ZX" and threads <= 1 else started


class DetachedProcess:
    """A running (or ended) process that the daemon does not own the life of.

    Attributes:
        identity: Its pid and start time.
    """

    def __init__(self, identity: ProcessIdentity) -> None:
        self.identity = identity

    @classmethod
    async def spawn(
        cls,
        argv: Sequence[str],
        *,
        record: Callable[[ProcessIdentity], Awaitable[None]],
        log: Path,
        user: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> DetachedProcess:
        """Start a program in a session of its own.

        Args:
            argv: Program and arguments.
            record: Awaited with the identity before the program runs; if it raises, nothing was started.
            log: File that gets stdout and stderr (appended).
            user: Account to run as, with its own group and no others; None: as the daemon.
            pass_fds: Descriptors the program inherits under the same numbers.

        Raises:
            FailedPrecondition: The account does not exist.
        """
        command = [*GATE, *(() if user is None else drop_privileges(user)), *argv]
        child = await _forked(command, log, tuple(pass_fds))
        assert child.stdin is not None
        started = start_time(child.pid)
        if started is None:
            child.wait()
            raise Internal(f"{argv[0]} could not be started; see {log}")
        process = cls(ProcessIdentity(pid=child.pid, start_time=started))
        try:
            await record(process.identity)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(b"go\n")
                child.stdin.flush()
        except BaseException:
            child.kill()
            child.wait()  # at once: it is ours and was only waiting for the line
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        # From here on the process is known by its identity alone, like one of an earlier daemon; _reap() collects it.
        # Popen would complain that it was left alone, which is the point of it.
        child.returncode = 0
        return process

    @property
    def name(self) -> str:
        """The program's name (proc(5), cmdline) for messages, or its pid when it has ended."""
        try:
            program = Path(f"/proc/{self.identity.pid}/cmdline").read_bytes().partition(b"\0")[0]
        except OSError:
            program = b""
        return os.path.basename(os.fsdecode(program)) or f"process {self.identity.pid}"

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return start_time(self.identity.pid) == self.identity.start_time

    async def wait(self) -> int | None:
        """Wait for the end; return the exit status (negative: signal), or None for a process of an earlier daemon."""
        try:
            fd = os.pidfd_open(self.identity.pid)
        except ProcessLookupError:
            return self._reap()
        try:
            if self.alive:
                await _readable(fd)
        finally:
            os.close(fd)
        return self._reap()

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to exactly this process; success when it is gone already."""
        try:
            fd = os.pidfd_open(self.identity.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive:  # after the open: the descriptor cannot change its process any more
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, sig)
        finally:
            os.close(fd)

    async def end(self, grace: float = 0.0) -> None:
        """End the process: SIGTERM and `grace` seconds when given, then SIGKILL, and wait until it is gone."""
        if grace > 0:
            self.kill(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self.wait()
                    return
        self.kill()
        await self.wait()

    def _reap(self) -> int | None:
        """Collect the exit status, if it is our child's and nobody has; init collects those of an earlier daemon's."""
        try:
            pid, status = os.waitpid(self.identity.pid, os.WNOHANG)
        except ChildProcessError:
            return None
        return os.waitstatus_to_exitcode(status) if pid else None


def drop_privileges(user: str, keep: Sequence[str] = ()) -> list[str]:
    """Return the setpriv(1) command that becomes an account for good: its ids, no other groups, no capabilities.

    Args:
        user: The account.
        keep: Capabilities that it has all the same, in setpriv's spelling.

    Raises:
        FailedPrecondition: The account does not exist.
    """
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise FailedPrecondition(
            f"hypervisor.user: no account named {user!r}", remedy="create it, or run make setup"
        ) from None
    ids = (f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups")
    capabilities = ",".join(["-all", *(f"+{name}" for name in keep)])
    sets = ["inh-caps", "bounding-set", *(["ambient-caps"] if keep else [])]
    return ["setpriv", *ids, *(f"--{one}={capabilities}" for one in sets), "--no-new-privs", "--"]


async def _forked(command: list[str], log: Path, pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Fork the gate in a thread; one that a cancelled caller does not wait for any more is collected."""
    made: list[subprocess.Popen[bytes]] = []
    try:
        await in_thread(lambda: made.append(_fork(command, log, pass_fds)))
    except asyncio.CancelledError:
        for child in made:
            child.kill()
            child.communicate()
        raise
    return made[0]


def _fork(command: list[str], log: Path, pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Start the gate. No user= or preexec_fn: they would make Popen fork the daemon's whole memory instead of vfork."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
            pass_fds=pass_fds,
            cwd="/",
            env={"PATH": PATH, "LANG": "C"},
        )


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        if not select.select([fd], [], [], 0)[0]:
            await ready
    finally:
        loop.remove_reader(fd)
