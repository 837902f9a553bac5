"""`python -m bench [MEASURE …]`: measure, print a table, write bench/results/latest.json.

`python -m bench --write-docs` puts the figures of the last run into docs/performance.*.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from bench.bed import ROOT, Bed, bed
from bench.measures import MEASURES
from bench.page import write_docs
from bench.records import Record, host, show, write

RESULTS = ROOT / "bench" / "results" / "latest.json"


def main() -> None:
    """Run the measures that are named, or all; or write the documentation."""
    parser = argparse.ArgumentParser(prog="make bench ONLY=…", description="Measure vmruntime beside its peers.")
    parser.add_argument("only", nargs="*", choices=[*MEASURES, []], help="measures; all by default")
    parser.add_argument("--write-docs", action="store_true", help="put the last run's figures into docs/performance.*")
    options = parser.parse_args()
    if options.write_docs:
        sys.exit(write_docs(RESULTS, ROOT / "docs"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was made is taken away
    names = options.only or list(MEASURES)
    if not options.only:
        RESULTS.unlink(missing_ok=True)  # a whole run is of one machine
    failed = run(list(dict.fromkeys(MEASURES[name] for name in names)))
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}")


def run(measures: list[Callable[[Bed], list[Record]]]) -> list[str]:
    """Measure, writing what is known after each measure; return the names of those that failed."""
    records: list[Record] = []
    failed = []
    began = time.monotonic()
    with bed() as one:
        about = host(one.node("cold").accelerator.value, one.guest_kernel)
        for measure in measures:
            try:
                records += _measured(measure, one)
            except Exception:
                traceback.print_exc()
                failed.append(measure.__name__)
                one.rest()
            write(RESULTS, _after(about, began), records)
    show(records)
    print(f"written to {RESULTS}", file=sys.stderr)
    return failed


def _measured(measure: Callable[[Bed], list[Record]], one: Bed) -> list[Record]:
    began = time.monotonic()
    made = measure(one)
    seconds = time.monotonic() - began
    print(f"{', '.join(record.measure for record in made)}: measured in {seconds:.0f} s", file=sys.stderr)
    return made


def _after(about: dict[str, Any], began: float) -> dict[str, Any]:
    """Return what is said of the host, with how long the run has taken and how busy the host has been."""
    return {**about, "load_after": round(os.getloadavg()[1], 2), "seconds": round(time.monotonic() - began)}


if __name__ == "__main__":
    main()
