"""Calls and their parts as bars below each other, on one scale of time: what ran beside each other looks so."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

from vmruntime.cli.render import printable
from vmruntime.generated.maintenance_pb2 import TracedCall, TracedPart
from vmruntime.ids import short_id

BAR_LEAST = 10
"""Cells; a narrower bar says nothing, and there is none."""
NAME_LEAST = 12
NUMBER_WIDTH = 9
FULL, LEFT, RIGHT = "█▌▐"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line: a call or a part of one. Times are milliseconds, `start` since the chart's beginning."""

    name: str
    depth: int
    start: float
    duration: float
    going_on: bool
    error: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A line as it is printed: what comes before the bar, the bar, and what the line stands for."""

    text: str
    bar: str
    row: Row


def charts(calls: Sequence[TracedCall]) -> list[list[TracedCall]]:
    """Return calls in the order of their beginnings; those that overlap are together, to be drawn on one scale."""
    found: list[list[TracedCall]] = []
    end = 0
    for call in sorted(calls, key=lambda one: one.started_at):
        if found and call.started_at < end:
            found[-1].append(call)
        else:
            found.append([call])
        end = max(end, call.started_at + _end(call.whole))
    return found


def _end(part: TracedPart) -> int:
    """Return when a part and all of its parts were over, in nanoseconds since its call began."""
    return max([part.start_ns + part.duration_ns, *map(_end, part.parts)])


def rows(chart: Sequence[TracedCall]) -> list[Row]:
    """Return the lines of one chart."""
    zero = chart[0].started_at
    found: list[Row] = []
    for call in chart:
        about = f" {call.container_name} ({short_id(call.container_id)})" if call.container_id else ""
        found += _rows(call.whole, call.whole.name + about, 0, call.started_at - zero)
    return found


def _rows(part: TracedPart, name: str, depth: int, offset: int) -> Iterator[Row]:
    yield Row(
        name=printable(name),
        depth=depth,
        start=(offset + part.start_ns) / 1e6,
        duration=part.duration_ns / 1e6,
        going_on=part.going_on,
        error=printable(part.error),
    )
    for one in part.parts:
        yield from _rows(one, one.name, depth + 1, offset)


def lines(chart: Sequence[Row], width: int) -> list[Line]:
    """Return the lines of a chart.

    Args:
        chart: In their order.
        width: Cells of the terminal. Where there is too little room there are no bars; then names are cut.
    """
    names = max(len(_indented(row)) for row in chart)
    numbers = 2 * (NUMBER_WIDTH + 1)
    room = width - names - numbers - 1
    if room < BAR_LEAST:
        names, room = min(names, max(NAME_LEAST, width - numbers)), 0
    total = max(row.start + row.duration for row in chart)
    made = []
    for row in chart:
        name = _indented(row)
        name = name if len(name) <= names else name[: names - 1] + "…"
        text = f"{name:{names}} {row.start:{NUMBER_WIDTH}.1f} {row.duration:{NUMBER_WIDTH}.1f}"
        made.append(Line(text, bar(row.start, row.duration, total, room), row))
    return made


def _indented(row: Row) -> str:
    return "  " * row.depth + row.name


def bar(start: float, duration: float, total: float, width: int) -> str:
    """Return a bar with a resolution of half a cell; what is too short for that gets half a cell."""
    if width <= 0:
        return ""
    halves = 2 * width
    scale = halves / total if total > 0 else 0.0
    first = min(int(start * scale), halves - 1)
    last = min(max(first + 1, round((start + duration) * scale)), halves)  # the first half cell after it
    drawn = " " * (first // 2)
    for cell in range(first // 2, (last + 1) // 2):
        left, right = first <= 2 * cell, last >= 2 * cell + 2
        drawn += FULL if left and right else LEFT if left else RIGHT
    return drawn


def plain(text: str) -> str:
    """Return a text as stdout can take it: where it has no block characters, with others in their place."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return (
            text.translate({ord(FULL): "#", ord(LEFT): "[", ord(RIGHT): "]"})
            .encode(encoding, "replace")
            .decode(encoding)
        )
    return text
