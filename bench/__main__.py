"""`python -m bench [MEASURE …]`: measure, print a table, write bench/results/latest.json."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.bed import bed
from bench.measures import MEASURES
from bench.records import Record, host, show, write

RESULTS = Path(__file__).resolve().parent / "results" / "latest.json"


def main() -> None:
    """Run the measures that are named, or all."""
    parser = argparse.ArgumentParser(prog="make bench ONLY=…", description="Measure vmruntime beside its peers.")
    parser.add_argument("only", nargs="*", choices=[*MEASURES, []], help="measures; all by default")
    names = parser.parse_args().only or list(MEASURES)
    records: list[Record] = []
    with bed() as one:
        about = host(one.accelerator)
        for measure in dict.fromkeys(MEASURES[name] for name in names):
            began = time.monotonic()
            made = measure(one)
            records += made
            print(f"{named(made)}: measured in {time.monotonic() - began:.0f} s", file=sys.stderr)
    write(RESULTS, about, records)
    show(records)
    print(f"written to {RESULTS}", file=sys.stderr)


def named(records: list[Record]) -> str:
    """Return the names of records."""
    return ", ".join(one.measure for one in records)


if __name__ == "__main__":
    main()
