"""The arithmetic and the file of benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.records import beside, histogram_quantile, number, percentile, record, write


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (50.0, 99.0, 7.0)
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_quantiles_of_a_histogram() -> None:
    buckets = [(1.0, 50.0), (2.0, 90.0), (4.0, 100.0), (math.inf, 100.0)]
    assert [histogram_quantile(buckets, which) for which in (0.25, 0.5, 0.7, 0.95, 1.0)] == [0.5, 1.0, 1.5, 3.0, 4.0]
    assert histogram_quantile([(1.0, 0.0), (math.inf, 10.0)], 0.99) == 1.0  # beyond the last bound
    assert histogram_quantile([(1.0, 0.0), (math.inf, 0.0)], 0.5) == 0.0  # of nothing


def test_a_ratio_needs_a_peer() -> None:
    assert record("m", "ms", [1.0, 2.0, 3.0], peer="p", peer_values=[4.0]).ratio == 0.5
    assert record("m", "ms", [1.0]).ratio is None


def test_a_second_peer_is_told_with_the_variant_that_is_beside_it() -> None:
    assert beside("p", [1.0, 2.0], [4.0]) == {"p50": 1.0, "peer": "p", "peer_p50": 4.0, "ratio": 0.25}
    assert beside("p", [1.0], [2.0], what="other way")["what"] == "other way"


def test_numbers_have_the_digits_that_say_something() -> None:
    assert [number(value) for value in (None, 0.0, 0.1234, 1.0, 12.345, 2130.4)] == [
        "",
        "0",
        "0.123",
        "1",
        "12.3",
        "2130",
    ]


def test_a_run_of_one_measure_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latest.json"
    write(path, {"cores": 1}, [record("a", "ms", [1.0]), record("b", "ms", [2.0])])
    assert json.loads(path.read_text())[0] == {"host": {"cores": 1, "one_run": True}}
    write(path, {"cores": 2}, [record("b", "ms", [3.0])])
    about, a, b = json.loads(path.read_text())
    assert about == {"host": {"cores": 2, "one_run": False}}
    assert (a["measure"], a["p50"], b["p50"]) == ("a", 1.0, 3.0)
    assert set(b) >= {"measure", "unit", "p50", "p99", "peer", "peer_p50", "ratio", "rounds"}
