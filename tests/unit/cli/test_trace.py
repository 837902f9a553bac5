"""`vmruntime trace`: bars, charts, and which pod is meant."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.unit.cli.conftest import Cli
from vmruntime.cli.waterfall import bar, charts, lines, plain, rows
from vmruntime.generated.maintenance_pb2 import TracedCall, TracedPart, TracedPod
from vmruntime.ids import short_id

MS = 1_000_000
NOON = 1_767_268_800_000_000_000


def part(name: str, start: float, duration: float, *parts: TracedPart, **more: Any) -> TracedPart:
    return TracedPart(name=name, start_ns=int(start * MS), duration_ns=int(duration * MS), parts=parts, **more)


def run_call() -> TracedCall:
    whole = part(
        "RunPodSandbox", 0, 100, part("sandbox.network", 0, 50, part("cni.bridge", 10, 30)), part("sandbox.boot", 0, 80)
    )
    return TracedCall(started_at=NOON, whole=whole)


def create_call(after: float, **more: Any) -> TracedCall:
    return TracedCall(
        started_at=NOON + int(after * MS),
        container_id="c" * 64,
        container_name="app",
        whole=part("CreateContainer", 0, 20, **more),
    )


@pytest.mark.parametrize(
    ("start", "duration", "drawn"),
    [
        (0, 100, "██████████"),
        (0, 50, "█████"),
        (50, 50, "     █████"),
        (0, 5, "▌"),
        (5, 5, "▐"),
        (5, 10, "▐▌"),
        (45, 20, "    ▐█▌"),
        (0, 0, "▌"),
        (99.9, 0.1, "         ▐"),
        (100, 0, "         ▐"),
        (33, 1, "   ▌"),
    ],
)
def test_bars(start: float, duration: float, drawn: str) -> None:
    assert bar(start, duration, 100, 10) == drawn


def test_bars_without_time_or_room() -> None:
    assert bar(0, 0, 0, 10) == "▌"
    assert bar(0, 10, 10, 0) == bar(0, 10, 10, -3) == ""


@pytest.mark.parametrize("width", [1, 2, 7, 80, 301])
def test_bars_never_leave_their_place(width: int) -> None:
    for start in range(0, 1001, 7):
        for duration in range(0, 1001 - start, 13):
            drawn = bar(start, duration, 1000, width)
            assert drawn.strip()
            assert len(drawn) <= width


def test_calls_that_overlap_share_a_scale() -> None:
    first, beside, later = run_call(), create_call(60), create_call(100.001)
    assert charts([later, beside, first]) == [[first, beside], [later]]
    shown = rows([first, beside])
    assert [(row.name, row.depth, row.start, row.duration) for row in shown] == [
        ("RunPodSandbox", 0, 0, 100),
        ("sandbox.network", 1, 0, 50),
        ("cni.bridge", 2, 10, 30),
        ("sandbox.boot", 1, 0, 80),
        (f"CreateContainer app ({short_id('c' * 64)})", 0, 60, 20),
    ]


def test_a_part_that_goes_on_after_its_caller_went_away_has_its_place() -> None:
    cut = TracedCall(
        started_at=NOON, whole=part("RunPodSandbox", 0, 10, part("sandbox.boot", 0, 90), error="CANCELLED")
    )
    assert charts([cut, create_call(50)]) == [[cut, create_call(50)]]
    whole, boot, _ = lines(rows([cut, create_call(50)]), 200)
    assert len(whole.bar) < len(boot.bar)


def test_lines_fit_the_terminal() -> None:
    shown = rows([run_call()])
    for width in (200, 80, 60):
        for line in lines(shown, width):
            assert len(f"{line.text} {line.bar}") <= width
            assert line.bar
    wide = lines(shown, 100)
    assert [line.text for line in wide] == [
        "RunPodSandbox           0.0     100.0",
        "  sandbox.network       0.0      50.0",
        "    cni.bridge         10.0      30.0",
        "  sandbox.boot          0.0      80.0",
    ]
    assert [len(line.bar) for line in wide] == [62, 31, 25, 50]


def test_narrow_terminals_have_no_bars_and_cut_names() -> None:
    shown = rows([run_call()])
    assert {line.bar for line in lines(shown, 40)} == {""}
    for width in (34, 20, 1):
        narrow = lines(shown, width)
        assert {len(line.text) for line in narrow} == {max(width, 32)}
    assert narrow[1].text.startswith("  sandbox.n…")


def test_where_there_are_no_block_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain("█▌▐ é…") == "█▌▐ é…"

    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii())
    assert plain("█▌▐ é…") == "#[] ??"


def test_trace_shows_a_pods_calls(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    pod = cli.cri.add_pod("web")
    cli.cri.traces[pod] = [run_call(), create_call(200, error="no\x1b[31m such file", going_on=True)]
    for text in ("web", pod, pod[:6]):
        result = cli("trace", text)
        assert result.exit_code == 0, result.stderr
        shown = result.stdout.splitlines()
        assert shown[0] == f"pod web ({short_id(pod)}); milliseconds"
        assert shown[2] == "2026-01-01T12:00:00.000000000Z"
        assert shown[3].split()[:3] == ["RunPodSandbox", "0.0", "100.0"]
        assert shown[5].startswith("    cni.bridge ")
        assert shown[8] == "2026-01-01T12:00:00.200000000Z"
        assert shown[-1] == "! no�[31m such file"
        assert all(len(line) <= 80 for line in shown)
    cli.cri.traces[pod][0].left_out = 7
    assert "7 parts more were not kept" in cli("trace", "web").stdout


def test_trace_as_json(cli: Cli) -> None:
    pod = cli.cri.add_pod("web")
    cli.cri.traces[pod] = [run_call(), create_call(200, error="no", attributes={"b": "1", "a": "2"})]
    told = json.loads(cli("trace", "-o", "json", "web").stdout)
    assert (told["id"], told["name"], told["namespace"], told["gone"]) == (pod, "web", "default", False)
    run, create = told["calls"]
    assert (run["name"], run["started_at"], run["duration_ms"], run["error"], run["container_id"]) == (
        "RunPodSandbox",
        "2026-01-01T12:00:00.000000000Z",
        100,
        None,
        None,
    )
    assert run["parts"][0]["parts"][0]["start_ms"] == 10
    assert (create["container_name"], create["error"], create["attributes"]) == ("app", "no", {"a": "2", "b": "1"})


def test_trace_of_pods_that_are_gone(cli: Cli) -> None:
    def gone(letter: str, name: str) -> str:
        pod_id = letter * 64
        cli.cri.traced.append(TracedPod(pod_sandbox_id=pod_id, name=name, namespace="default", gone=True))
        cli.cri.traces[pod_id] = [
            TracedCall(started_at=NOON, whole=part("RunPodSandbox", 0, 1, error=f"error {letter}"))
        ]
        return pod_id

    gone("a", "web")
    gone("b", "web")
    gone("b", "other")
    assert "error b" in cli("trace", "web").stdout  # the newest
    assert "which is gone" in cli("trace", "aaaa").stdout
    assert "error a" in cli("trace", "a" * 64).stdout
    assert "may be any of" in cli("trace", "bbb").stderr
    result = cli("trace", "nothing")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (1, "error: no pod has the id or name 'nothing'")
    cli.cri.add_pod("web")  # one that is here comes first
    result = cli("trace", "web")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "restarted" in result.stderr
    assert json.loads(cli("trace", "-o", "json", "web").stdout)["calls"] == []
