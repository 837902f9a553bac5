"""What a benchmark leaves: records, their JSON file and their table."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table


class Record(msgspec.Struct, kw_only=True):
    """One measure.

    Attributes:
        measure: Its name, the same in every run.
        unit: Of p50, p99 and peer_p50.
        peer: What it is compared with, in words; empty: nothing.
        ratio: p50 ÷ peer_p50; None without a peer.
        extra: Where the value comes from, such as phases; under "beside" what `beside` makes of more peers.
    """

    measure: str
    unit: str
    p50: float
    p99: float
    peer: str = ""
    peer_p50: float | None = None
    ratio: float | None = None
    rounds: int = 1
    extra: dict[str, Any] = {}


def record(
    measure: str,
    unit: str,
    values: Sequence[float],
    *,
    peer: str = "",
    peer_values: Sequence[float] = (),
    extra: dict[str, Any] | None = None,
) -> Record:
    """Return the record of a measure's values and, where there is a peer, of its values."""
    p50 = percentile(values, 50)
    peer_p50 = percentile(peer_values, 50) if peer_values else None
    return Record(
        measure=measure,
        unit=unit,
        p50=round(p50, 3),
        p99=round(percentile(values, 99), 3),
        peer=peer,
        peer_p50=None if peer_p50 is None else round(peer_p50, 3),
        ratio=None if not peer_p50 else round(p50 / peer_p50, 3),
        rounds=len(values),
        extra=extra or {},
    )


def beside(peer: str, values: Sequence[float], peer_values: Sequence[float], *, what: str = "") -> dict[str, Any]:
    """Return what `extra` has under "beside" for one more peer.

    Args:
        peer: The peer in words.
        values: Of the measure, or of a variant of it.
        peer_values: Of the peer.
        what: The variant in words; empty: the measure itself.
    """
    p50, peer_p50 = percentile(values, 50), percentile(peer_values, 50)
    found = {"p50": round(p50, 3), "peer": peer, "peer_p50": round(peer_p50, 3), "ratio": round(p50 / peer_p50, 3)}
    return {"what": what, **found} if what else found


def percentile(values: Sequence[float], which: float) -> float:
    """Return the nearest-rank percentile; raise ValueError when there are no values."""
    if not values:
        raise ValueError("a percentile of no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(which / 100 * len(ordered)) - 1)]


def histogram_quantile(buckets: Sequence[tuple[float, float]], which: float) -> float:
    """Return a quantile of a cumulative histogram, interpolated within a bucket as Prometheus does.

    Args:
        buckets: Upper bound and number of samples up to it, in order; the last bound is infinite.
        which: Between 0 and 1.
    """
    if not buckets[-1][1]:
        return 0.0
    wanted, lower, below = which * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower


def host(accelerator: str, guest: str) -> dict[str, Any]:
    """Return what the figures depend on.

    Args:
        accelerator: How guests run.
        guest: The guest's kernel.
    """
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_mib": memory // 1024**2,
        "accelerator": accelerator,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": _first_line("qemu-system-" + platform.machine(), "--version"),
        "containerd": _first_line("containerd", "--version"),
        "runc": _first_line("runc", "--version"),
        "skopeo": _first_line("skopeo", "--version"),
        "guest": guest,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_before": round(os.getloadavg()[0], 2),
    }


def write(path: Path, about: dict[str, Any], records: Sequence[Record]) -> None:
    """Write a run; measures that an earlier run of the same file had and this one did not make are kept.

    `one_run` in what is said of the host tells whether there are none of these.
    """
    made = {one.measure: msgspec.to_builtins(one) for one in records}
    kept: dict[str, Any] = {}
    if path.exists():
        kept = {one["measure"]: one for one in json.loads(path.read_text()) if "measure" in one}
    about = {**about, "one_run": kept.keys() <= made.keys()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"host": about}, *(kept | made).values()], indent=1) + "\n")


def show(records: Sequence[Record]) -> None:
    """Print a table."""
    table = Table(title="vmruntime beside its peers")
    for name in ("measure", "unit", "p50", "p99", "peer", "peer p50", "ratio", "rounds"):
        table.add_column(name, justify="left" if name in ("measure", "unit", "peer") else "right")
    for one in records:
        cells = (number(one.p50), number(one.p99), one.peer, number(one.peer_p50), number(one.ratio), str(one.rounds))
        table.add_row(one.measure, one.unit, *cells)
        for more in one.extra.get("beside", []):
            cells = ("  " + more.get("what", ""), "", number(more["p50"]), "", more["peer"], number(more["peer_p50"]))
            table.add_row(*cells, number(more["ratio"]), "")
    console = Console(width=160)
    console.print(table)
    for one in records:
        if rest := {name: value for name, value in one.extra.items() if name != "beside"}:
            console.print(f"[bold]{one.measure}[/bold] {json.dumps(rest)}", highlight=False)


def number(value: float | None) -> str:
    """Return three digits that say something, without exponents; None: nothing."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "not found"
