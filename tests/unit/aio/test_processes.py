"""Helper programs and detached processes."""

from __future__ import annotations

import asyncio
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmruntime.aio.detached import DetachedProcess, ProcessIdentity, drop_privileges, start_time
from vmruntime.aio.process import run
from vmruntime.errors import DeadlineExceeded, FailedPrecondition, Internal


async def test_run_returns_output_and_status() -> None:
    done = await run(["/bin/sh", "-c", "cat; echo oops >&2; exit 3"], input=b"in")
    assert (done.stdout, done.stderr, done.returncode) == (b"in", "oops\n", 3)
    with pytest.raises(Internal, match="status 3: oops"):
        done.check()


@pytest.mark.parametrize("awaited", [False, True])
async def test_who_shares_our_part_of_the_processors(awaited: bool) -> None:
    """A program that is awaited is in our session, but never in our process group, which gets the terminal's signals."""
    done = await run(["/bin/sh", "-c", "echo $$; cat /proc/$$/stat"], awaited=awaited)
    pid, stat = done.stdout.decode().splitlines()
    group, session = stat.rpartition(")")[2].split()[2:4]
    assert group == pid
    assert session == (str(os.getsid(0)) if awaited else pid)


@pytest.mark.parametrize("awaited", [False, True])
async def test_run_kills_all_children_when_time_is_up(tmp_path: Path, awaited: bool) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        await run(["/bin/sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], timeout=0.2, awaited=awaited)
    child = int(pid_file.read_text())
    for _ in range(100):
        if start_time(child) is None:
            break
        await asyncio.sleep(0.01)
    assert start_time(child) is None


async def test_a_missing_program_is_named() -> None:
    with pytest.raises(FailedPrecondition, match="'no-such-program' is not installed"):
        await run(["no-such-program"])


async def test_detached_is_recorded_before_it_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    seen: list[ProcessIdentity] = []

    async def record(identity: ProcessIdentity) -> None:
        await asyncio.sleep(0.05)
        assert log.read_text() == ""
        seen.append(identity)

    process = await DetachedProcess.spawn(["/bin/sh", "-c", "echo ran; exit 7"], record=record, log=log)
    assert await process.wait() == 7
    assert seen == [process.identity]
    assert log.read_text() == "ran\n"


async def test_detached_never_runs_when_recording_fails(tmp_path: Path) -> None:
    async def record(identity: ProcessIdentity) -> None:
        raise Internal("disk full")

    with pytest.raises(Internal, match="disk full"):
        await DetachedProcess.spawn(["/bin/sh", "-c", "echo ran"], record=record, log=tmp_path / "log")
    await asyncio.sleep(0.05)
    assert (tmp_path / "log").read_text() == ""


async def test_another_process_under_the_same_pid_is_not_ours() -> None:
    impostor = DetachedProcess(ProcessIdentity(pid=os.getpid(), start_time=1))
    assert not impostor.alive
    await impostor.end()  # would end this test run if pids alone counted
    assert await impostor.wait() is None


def test_unknown_account_is_named() -> None:
    with pytest.raises(FailedPrecondition, match=r"hypervisor\.user: no account named 'nobody-here'"):
        drop_privileges("nobody-here")


def test_capabilities_go_but_for_those_to_keep() -> None:
    account = pwd.getpwuid(os.getuid()).pw_name
    gone = ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]
    assert drop_privileges(account)[4:] == gone
    kept = "-all,+net_admin,+net_raw"
    assert drop_privileges(account, ["net_admin", "net_raw"])[4:] == [
        f"--inh-caps={kept}", f"--bounding-set={kept}", f"--ambient-caps={kept}", "--no-new-privs", "--",
    ]  # fmt: skip


HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def headless() -> subprocess.Popen[bytes]:
    """Start a process whose first thread has ended and whose second goes on."""
    child = subprocess.Popen([sys.executable, "-c", HEADLESS], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    deadline = time.monotonic() + 10
    while ") Z" not in Path(f"/proc/{child.pid}/stat").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    return child


async def test_a_process_is_there_until_its_last_thread_is_gone() -> None:
    """Killed programs with threads die first thread first: until the others follow, they hold files and cgroups."""
    with await asyncio.to_thread(headless) as child:
        started = start_time(child.pid)
        assert started is not None
        process = DetachedProcess(ProcessIdentity(pid=child.pid, start_time=started))
        assert process.alive
        await process.end()
        assert not process.alive
        assert not Path(f"/proc/{child.pid}").exists()  # collected too
        child.returncode = -9
