"""Spans and the recorder: what is kept, for how long, and how it nests."""

from __future__ import annotations

import asyncio
import time

import pytest

from vmruntime import tracing
from vmruntime.aio.tasks import Shared, TaskScope
from vmruntime.errors import FailedPrecondition
from vmruntime.recorder import CALL_PARTS, Call, Part, PodNames, Recorder


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    fresh = Recorder()
    monkeypatch.setattr(tracing, "RECORDER", fresh)
    return fresh


def pod(sandbox_id: str = "p") -> PodNames:
    return PodNames(sandbox_id, f"name-{sandbox_id}", "default", "uid")


def call(method: str = "Method") -> tracing.Served:
    """Make a whole call about the pod p."""
    with tracing.served(f"/a.B/{method}", {}, current=True) as served:
        tracing.about(pod(), {"k": method})
        served.answered(0, failed=False)
    return served


def inside(part: Part) -> list[Part]:
    return part.parts or []


def names(part: Part) -> list[str]:
    return [one.name for one in inside(part)]


def test_parts_nest_and_errors_stay_where_they_were(recorder: Recorder) -> None:
    with tracing.served("/a.B/Method", {}, current=True) as served:
        with tracing.span("first", {"n": 1}):
            with tracing.span("inner"):
                tracing.about(pod(), {"k": "v"})
        with pytest.raises(FailedPrecondition), tracing.span("second"):
            raise FailedPrecondition("no disk")
        with pytest.raises(ValueError, match="secret"), tracing.span("third"):
            raise ValueError("secret")
        (going_on,) = recorder.calls("p")
        assert not going_on.whole.end  # it can be looked at meanwhile
        served.answered(9, failed=True, message="no disk")
    (kept,) = recorder.calls("p")
    whole = kept.whole
    assert (whole.name, whole.error, kept.attributes, names(whole)) == (
        "Method",
        "no disk",
        {"k": "v"},
        ["first", "second", "third"],
    )
    first, second, third = inside(whole)
    assert (first.attributes, names(first)) == ({"n": 1}, ["inner"])
    assert (first.error, second.error, third.error) == ("", "no disk", "ValueError")
    assert whole.start <= first.start <= first.end <= second.start <= third.end <= whole.end
    assert abs(kept.started_at / 1e9 - time.time()) < 60


async def test_what_runs_beside_each_other_is_part_of_the_same(recorder: Recorder) -> None:
    async def work(name: str, mine: asyncio.Event, other: asyncio.Event) -> None:
        with tracing.span(name):
            mine.set()
            await other.wait()
            with tracing.span(f"{name}.inner"):
                pass

    a, b = asyncio.Event(), asyncio.Event()
    with tracing.served("/a.B/Method", {}, current=True):
        tracing.about(pod(), {})
        async with asyncio.TaskGroup() as group:
            group.create_task(work("a", a, b))
            group.create_task(work("b", b, a))
    (kept,) = recorder.calls("p")
    one, other = inside(kept.whole)
    assert (names(one), names(other)) == (["a.inner"], ["b.inner"])
    assert max(one.start, other.start) < min(one.end, other.end)


async def test_work_that_outlives_its_caller_is_seen_to_its_end_and_later_work_is_not(recorder: Recorder) -> None:
    scope = TaskScope("test")
    go_on, later, seen = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def background() -> None:
        await later.wait()
        with tracing.span("stray"):
            seen.set()

    async def work() -> None:
        with tracing.span("slow"):
            await go_on.wait()
        with tracing.span("after"):
            scope.start(background(), "background")

    async def serve() -> None:
        with tracing.served("/a.B/Method", {}, current=True) as served:
            tracing.about(pod(), {})
            try:
                await Shared(scope).run(work, "work")
            finally:
                served.answered(1, failed=False, message="CANCELLED")

    serving = asyncio.create_task(serve())
    while not (calls := recorder.calls("p")) or not calls[0].whole.parts:
        await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    whole = recorder.calls("p")[0].whole
    assert (whole.error, names(whole)) == ("CANCELLED", ["slow"])
    go_on.set()
    later.set()
    await seen.wait()
    await scope.close()
    assert names(whole) == ["slow", "after"]
    assert inside(whole)[1].end > whole.end > 0


def test_calls_of_a_pod_are_bounded_and_its_start_stays(recorder: Recorder) -> None:
    bounded = Recorder(pod_calls=3)
    for number in range(10):
        bounded.keep(Call(f"call {number}"), pod())
    assert [one.whole.name for one in bounded.calls("p")] == ["call 0", "call 7", "call 8", "call 9"]
    assert bounded.total == 4
    call("RunPodSandbox")
    call("ExecSync")  # a probe's
    assert [one.whole.name for one in recorder.calls("p")] == ["RunPodSandbox"]


def test_parts_of_a_call_are_bounded(recorder: Recorder) -> None:
    with tracing.served("/a.B/Method", {}, current=True):
        tracing.about(pod(), {})
        for _ in range(CALL_PARTS + 10):
            with tracing.span("part"), tracing.span("inner"):
                pass
    (kept,) = recorder.calls("p")
    assert kept.count == recorder.total == CALL_PARTS
    # All but the whole itself and 255 parts: 128 with 127 inside. What is inside a part that is left out is not looked at.
    assert kept.left_out == CALL_PARTS + 10 - 128 + 1


def test_only_the_last_pods_that_are_gone_are_kept() -> None:
    bounded = Recorder(gone_pods=2)
    for name in ("a", "b", "c", "d"):
        bounded.keep(Call("RunPodSandbox"), pod(name))
    for name in ("a", "b", "c", "unknown"):
        bounded.gone(name)
    assert [(one.id, gone) for one, gone in bounded.pods()] == [("b", True), ("c", True), ("d", False)]
    assert (bounded.calls("a"), len(bounded.calls("b")), bounded.total) == ([], 1, 3)


def test_parts_in_all_are_bounded() -> None:
    bounded = Recorder(all_parts=10)

    def keep(name: str, parts: int) -> Call:
        made = Call("RunPodSandbox")
        for _ in range(parts - 1):
            made.begin(made.whole, "part", None, 0.0)
        bounded.keep(made, pod(name))
        return made

    keep("gone", 2)
    keep("old", 3)
    keep("young", 3)
    bounded.gone("gone")
    keep("old", 1)  # makes it the younger one
    keep("newest", 3)  # 12 in all
    assert [one.id for one, _ in bounded.pods()] == ["young", "old", "newest"]
    assert bounded.total == 10
    keep("newest", 1)
    assert [one.id for one, _ in bounded.pods()] == ["old", "newest"]
    late = keep("newest", 1)
    for _ in range(20):  # parts of a call that is kept count as well
        late.begin(late.whole, "part", None, 0.0)
    keep("another", 1)
    assert [one.id for one, _ in bounded.pods()] == ["another"]
    assert bounded.total == 1
    late.begin(late.whole, "part", None, 0.0)  # dropped while it goes on
    assert bounded.total == 1


def test_a_call_that_is_about_no_pod_is_not_kept(recorder: Recorder) -> None:
    with tracing.served("/a.B/Version", {}, current=True), tracing.span("part"):
        pass
    with tracing.span("outside"):
        tracing.about(pod(), {})
    with tracing.served("/a.B/Stream", {}, current=False), tracing.span("part"):
        tracing.about(pod(), {})
    assert (recorder.pods(), recorder.total) == ([], 0)


def measure(spent: float, parts: list[tuple[str, float, float]], recorder: Recorder) -> tuple[float, list[Part]]:
    """Return when waiting began and what became of the parts that somebody measured in `spent` seconds."""
    with tracing.served("/a.B/Method", {}, current=True):
        tracing.about(pod(), {})
        began = time.monotonic() - spent
        tracing.measured(began, parts)
    return began, inside(recorder.calls("p")[-1].whole)


def test_parts_that_somebody_else_measured_lie_in_the_middle(recorder: Recorder) -> None:
    began, (one, other) = measure(1.0, [("one", 0.0, 0.3), ("other", 0.2, 0.4)], recorder)
    assert one.start - began == pytest.approx(0.2, abs=0.05)
    assert one.end - began == pytest.approx(0.5, abs=0.05)
    assert other.start - one.start == pytest.approx(0.2)
    assert other.end - other.start == pytest.approx(0.4)


def test_parts_that_cannot_be_true_are_cut_off(recorder: Recorder) -> None:
    parts = [("long", 0.0, 1e9), ("late", 5e8, 1.0)]
    began, (long, late) = measure(1.0, parts, recorder)
    now = time.monotonic()
    assert (long.start, late.start) == (began, late.end)
    assert long.end == pytest.approx(now, abs=0.5)
    assert late.end <= now
    assert measure(1.0, [], recorder)[1] == []


async def test_a_function_can_be_timed_as_a_whole(recorder: Recorder) -> None:
    @tracing.timed("work")
    async def work(fail: bool) -> int:
        with tracing.span("inner"):
            if fail:
                raise FailedPrecondition("no")
            return 3

    with tracing.served("/a.B/Method", {}, current=True):
        tracing.about(pod(), {})
        assert await work(False) == 3
        with pytest.raises(FailedPrecondition):
            await work(fail=True)
    assert await work(False) == 3  # nothing goes on: nothing to take down
    first, second = inside(recorder.calls("p")[0].whole)
    assert (first.name, first.error, second.error, names(second)) == ("work", "", "no", ["inner"])
