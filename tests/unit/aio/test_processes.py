"""Helper programs and detached processes."""

from __future__ import annotations

import asyncio
import os
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


async def test_run_kills_the_whole_session_when_time_is_up(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        await run(["/bin/sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], timeout=0.2)
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
