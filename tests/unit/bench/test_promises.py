"""What is promised, in words and by figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.measures import MEASURES
from bench.promises import PROMISES, Promise
from bench.records import record

SPECIFICATION = Path(__file__).parents[3] / "SPECIFICATION.md"


def test_every_measure_has_an_entry() -> None:
    assert set(PROMISES) == set(MEASURES)


def test_the_specification_says_the_same() -> None:
    rows = [line.split(" | ") for line in SPECIFICATION.read_text().splitlines() if line.startswith("| `")]
    said = {name.strip("| `"): row[1] for row in reversed(rows) if len(row) == 3 for name in row[0].split(", ")}
    assert said == {name: promise.text() for name, promise in PROMISES.items()}


@pytest.mark.parametrize(
    ("promise", "value", "kept"),
    [
        (Promise(what="w", figure="ratio", at_most=1.0), 2.0, True),
        (Promise(what="w", figure="ratio", at_most=1.0), 2.1, False),
        (Promise(what="w", figure="ratio", at_least=0.9), 1.7, False),
        (Promise(what="w", figure="p99", at_most=2.0), 2.0, True),
        (Promise(what="w", figure="over_ms", at_most=5.0), 2.0, True),
        (Promise(what="w", figure="other_ms", at_most=5.0), 2.0, None),
        (Promise(what="w"), 2.0, None),
    ],
)
def test_what_is_kept(promise: Promise, value: float, kept: bool | None) -> None:
    one = record("m", "ms", [value], peer="p", peer_values=[2.0], extra={"over_ms": 3.0})
    assert promise.kept(one) is kept


def test_without_a_peer_no_ratio_is_kept_or_broken() -> None:
    assert Promise(what="w", figure="ratio", at_most=1.0).kept(record("m", "ms", [1.0])) is None
