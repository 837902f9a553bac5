"""Kubernetes quantities."""

from __future__ import annotations

from decimal import Decimal

import pytest

from vmruntime.model import quantity


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("1Gi", 2**30), ("1.5Gi", 3 * 2**29), ("500M", 5 * 10**8), ("2e3", 2000), ("2E", 2 * 10**18), (".5k", 500),
     ("100m", Decimal("0.1")), ("-1", -1), ("1E3", 1000), ("7Ei", 7 * 2**60)],
)  # fmt: skip
def test_numbers(text: str, number: Decimal) -> None:
    assert quantity.parse(text) == number


@pytest.mark.parametrize("text", ["", "x", "1 Gi", "1GB", "Gi", "1e", "--1", "0x10", "1i", "\u0661"])
def test_what_is_none(text: str) -> None:
    assert quantity.parse(text) is None
