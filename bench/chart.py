"""The chart of docs/performance.md: how soon pods start, beside their peers, as a plain SVG."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from bench.records import Record, number

SHOWN = {
    "sandbox_start_cold": "Sandbox, cold boot",
    "sandbox_start_template": "Sandbox, from the template",
    "sandbox_start_warm": "Sandbox, warm VM",
    "first_output": "First line of output",
    "container_start": "Container in a running pod",
}
"""What is in the chart, by measure."""

WIDTH = 760
LEFT, RIGHT, TOP = 240, 90, 64
BAR, GAP, GROUP_GAP = 16, 4, 22

# The card brings its own background, so it can be read on any page; browsers tell it whether dark is wanted.
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.group { font-weight: 600 }
.card { fill: #ffffff; stroke: #d0d7de }
.ours { fill: #0969da }
.qemu { fill: #9a6700 }
.containerd { fill: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .card { fill: #0d1117; stroke: #30363d }
  .ours { fill: #58a6ff }
  .qemu { fill: #d29922 }
  .containerd { fill: #8b949e }
}"""

KINDS = {"ours": "vmruntime", "qemu": "QEMU alone, booting", "containerd": "containerd and runc"}


@dataclasses.dataclass(frozen=True)
class _Bar:
    kind: str
    value: float


def chart(records: Sequence[Record]) -> str:
    """Return the SVG of those records that it shows, medians in milliseconds on one linear scale."""
    groups = [(SHOWN[one.measure], _bars(one)) for one in records if one.measure in SHOWN]
    most = max((bar.value for _, bars in groups for bar in bars), default=1.0)
    body, y = list(_legend()), TOP
    for title, bars in groups:
        height = len(bars) * (BAR + GAP) - GAP
        body.append(_text(LEFT - 12, y + height / 2 + 5, title, "group", "end"))
        for bar in bars:
            width = max(1.0, bar.value / most * (WIDTH - LEFT - RIGHT))
            body.append(f'<rect class="{bar.kind}" x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>')
            body.append(_text(LEFT + width + 6, y + BAR - 3, f"{number(bar.value)} ms"))
            y += BAR + GAP
        y += GROUP_GAP - GAP
    return "\n".join([*_head(y, groups), *body, "</svg>"]) + "\n"


def _bars(one: Record) -> list[_Bar]:
    """Return ours first, then the peers that have a colour."""
    peers = [(one.peer, one.peer_p50), *((more["peer"], more["peer_p50"]) for more in one.extra.get("beside", []))]
    bars = [_Bar("ours", one.p50)]
    for words, value in peers:
        kind = "qemu" if words.startswith("QEMU alone") else "containerd" if words.startswith("containerd") else ""
        if kind and value is not None:
            bars.append(_Bar(kind, value))
    return sorted(bars, key=lambda bar: list(KINDS).index(bar.kind))


def _head(height: int, groups: Sequence[tuple[str, Sequence[_Bar]]]) -> Iterator[str]:
    said = "; ".join(
        f"{title}: {', '.join(f'{KINDS[bar.kind]} {number(bar.value)} ms' for bar in bars)}" for title, bars in groups
    )
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    yield "<title>How soon pods start: medians, shorter is better</title>"
    yield f"<desc>{escape(said)}</desc>"
    yield f"<style>\n{STYLE}\n</style>"
    yield f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>'
    yield _text(16, 26, "How soon pods start (median, shorter is better)", "title")


def _legend() -> Iterator[str]:
    x = 16
    for kind, words in KINDS.items():
        yield f'<rect class="{kind}" x="{x}" y="38" width="12" height="12" rx="2"/>'
        yield _text(x + 18, 49, words)
        x += 40 + 8 * len(words)


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{style}{side}>{escape(words)}</text>'
