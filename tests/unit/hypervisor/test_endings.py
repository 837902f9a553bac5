"""How a VM's end and its reboots are told, from what its monitor says."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from vmruntime.hypervisor.endings import end_by_status
from vmruntime.hypervisor.errors import VmGone
from vmruntime.hypervisor.interface import VmEnd
from vmruntime.hypervisor.qemu.balloon import STALE_SECONDS, balloon_stats
from vmruntime.hypervisor.qemu.endings import Endings
from vmruntime.hypervisor.qemu.monitor import Monitor

MIB = 1 << 20


class Telling:
    """A monitor that tells events, and answers commands with what it was given."""

    def __init__(self, *told: dict[str, Any], **answers: Any) -> None:
        self.told = told
        self.answers = answers

    async def events(self, *names: str) -> AsyncIterator[dict[str, Any]]:
        for event in self.told:
            assert event["event"] in names
            yield event

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        try:
            return self.answers[command.replace("-", "_")]
        except KeyError:
            raise VmGone("QEMU is gone") from None


def event(name: str, at: float = 0.0, **data: Any) -> dict[str, Any]:
    timestamp = {"seconds": 1_700_000_000 + int(at), "microseconds": int(at % 1 * 1e6)}
    return {"event": name, "timestamp": timestamp, "data": data}


async def after(*told: dict[str, Any], **answers: Any) -> Endings:
    endings = Endings(cast(Monitor, Telling(*told, **answers)))
    await endings.listen()
    return endings


@pytest.mark.parametrize(
    ("told", "state", "end"),
    [
        (event("SHUTDOWN", guest=True, reason="guest-shutdown"), "shutdown", VmEnd.POWEROFF),
        (event("GUEST_PANICKED", action="pause"), "guest-panicked", VmEnd.CRASH),
        (event("STOP"), "internal-error", VmEnd.LOST),
    ],
)
async def test_a_guest_that_ended_under_a_qemu_that_stays(told: dict[str, Any], state: str, end: VmEnd) -> None:
    endings = await after(told, query_status={"status": state})
    assert endings.end is end
    assert endings.reason
    assert endings.over.is_set()


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        ("guest-shutdown", VmEnd.POWEROFF),
        ("guest-reset", VmEnd.CRASH),
        ("guest-panic", VmEnd.CRASH),
        ("host-signal", VmEnd.KILLED),
        ("host-qmp-quit", VmEnd.KILLED),
        ("of-the-future", None),
    ],
)
async def test_a_qemu_that_ends_itself(reason: str, end: VmEnd | None) -> None:
    endings = await after(event("SHUTDOWN", guest=False, reason=reason))
    assert endings.end is end
    assert not endings.over.is_set()


async def test_the_first_reason_is_kept() -> None:
    endings = await after(event("GUEST_PANICKED"), event("SHUTDOWN", guest=True, reason="guest-shutdown"))
    assert endings.end is VmEnd.CRASH


async def test_a_pause_is_no_end() -> None:
    endings = await after(event("STOP"), query_status={"status": "paused"})
    assert endings.end is None
    assert not endings.over.is_set()


async def test_resets_close_together_are_one_reboot() -> None:
    endings = await after(*(event("RESET", at, guest=True, reason="guest-reset") for at in (10, 10.1, 11.9, 20, 20.5)))
    assert endings.reboots == 2
    assert endings.end is None


async def test_a_reset_that_is_a_part_of_the_start_is_no_reboot() -> None:
    resets = [event("RESET", at, guest=False, reason="host-qmp-system-reset") for at in (10, 20)]
    endings = Endings(cast(Monitor, Telling(*resets)))
    endings.expect_reset()
    await endings.listen()
    assert endings.reboots == 1


def test_an_exit_status() -> None:
    assert end_by_status(-signal.SIGKILL) is VmEnd.KILLED
    for status in (None, 0, 1, -signal.SIGSEGV, -signal.SIGABRT):
        assert end_by_status(status) is VmEnd.LOST


def balloon(monkeypatch: pytest.MonkeyPatch, last_update: int, **stats: int) -> Monitor:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    names = {name.replace("_", "-"): value for name, value in stats.items()}
    answer = {"last-update": last_update, "stats": names}
    size = {"base-memory": 256 * MIB, "plugged-memory": 128 * MIB}
    return cast(Monitor, Telling(qom_get=answer, query_memory_size_summary=size))


async def test_a_balloon_that_says_too_much_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = balloon(
        monkeypatch,
        999,
        stat_total_memory=1 << 50,
        stat_free_memory=5 * MIB,
        stat_swap_in=2**64 - 1,
        stat_major_faults=7,
    )
    assert await balloon_stats(monitor, "balloon") == {
        "stat-total-memory": 384 * MIB,
        "stat-free-memory": 5 * MIB,
        "stat-major-faults": 7,
    }


@pytest.mark.parametrize("last_update", [0, 1000 - int(STALE_SECONDS) - 1])
async def test_a_balloon_that_has_said_nothing_for_long(monkeypatch: pytest.MonkeyPatch, last_update: int) -> None:
    assert await balloon_stats(balloon(monkeypatch, last_update, stat_total_memory=MIB), "balloon") == {}
