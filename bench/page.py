"""The figures of a run in docs/performance.md, and its chart; both are what docs/performance.json says and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.chart import chart
from bench.promises import PROMISES
from bench.records import Record, number

BEGIN = "<!-- from performance.json by `make bench-docs`: begin -->"
END = "<!-- from performance.json by `make bench-docs`: end -->"


def write_docs(results: Path, docs: Path) -> str | None:
    """Put a run into performance.json, performance.md and performance.svg; return what is wrong, or None.

    Args:
        results: What the run wrote.
        docs: The directory of the three.
    """
    if not results.exists():
        return f"error: there is no {results}; `make bench` makes it"
    about, records = read(results.read_text())
    if missing := [name for name in PROMISES if name not in {one.measure for one in records}]:
        print(f"note: not measured in this run: {', '.join(missing)}", file=sys.stderr)
    ordered = sorted(records, key=lambda one: list(PROMISES).index(one.measure))
    (docs / "performance.json").write_text(to_json(about, ordered))
    page = docs / "performance.md"
    page.write_text(replaced(page.read_text(), figures(about, ordered)))
    (docs / "performance.svg").write_text(chart(ordered))
    return None


def to_json(about: dict[str, Any], records: Sequence[Record]) -> str:
    """Return a run as it is written."""
    return json.dumps([{"host": about}, *(msgspec.to_builtins(one) for one in records)], indent=1) + "\n"


def read(text: str) -> tuple[dict[str, Any], list[Record]]:
    """Return the host and the records of a run."""
    about, *records = json.loads(text)
    return about["host"], [msgspec.convert(one, Record) for one in records]


def replaced(page: str, text: str) -> str:
    """Return a page with other text between the two marks.

    Raises:
        ValueError: It has not both marks.
    """
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}{END}{after}"


def figures(about: dict[str, Any], records: Sequence[Record]) -> str:
    """Return the machine and the table in Markdown."""
    return "\n".join([_machine(about), "", *_table(records)]) + "\n"


def _machine(about: dict[str, Any]) -> str:
    how = {"tcg": "TCG: guests are emulated, this machine has no hardware virtualisation", "kvm": "KVM"}
    programs = [about[name] for name in ("qemu", "containerd", "runc", "skopeo")]
    one, several = f"in one run of {about['seconds'] // 60} minutes", "in several runs, of which this is the last"
    run = one if about["one_run"] else several
    return (
        f"Made on {about['date']} {run}: {about['cpu']}, {about['cores']} cores, "
        f"{about['memory_mib']} MiB. Accelerator: {how[about['accelerator']]}. Linux {about['kernel']}, "
        f"in guests {about['guest']}; Python {about['python']}; {'; '.join(programs)}. "
        f"Load before and after: {about['load_before']} and {about['load_after']}."
    )


def _table(records: Sequence[Record]) -> Iterator[str]:
    yield "| measure | p50 | p99 | rounds | beside | its p50 | ratio | promise |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in records:
        promise = PROMISES[one.measure]
        verdict = {True: "kept: ", False: "**not kept**: ", None: ""}[promise.kept(one)]
        name = f"`{one.measure}`: {promise.what}"
        cells = [name, _with_unit(one.p50, one.unit), _with_unit(one.p99, one.unit), str(one.rounds)]
        cells += [one.peer, _with_unit(one.peer_p50, one.unit), number(one.ratio), verdict + promise.text()]
        yield _row(cells)
        for more in one.extra.get("beside", []):
            what = f"… {more['what']}" if "what" in more else ""
            own = _with_unit(more["p50"], one.unit) if what else ""
            cells = [what, own, "", "", more["peer"], _with_unit(more["peer_p50"], one.unit), number(more["ratio"]), ""]
            yield _row(cells)


def _with_unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{number(value)} {unit}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
