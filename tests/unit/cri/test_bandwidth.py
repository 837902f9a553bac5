"""Kubernetes' quantities, as far as an annotation of bandwidth may have them."""

from __future__ import annotations

import pytest

from vmruntime.cri.translate.bandwidth import bandwidth_from_annotations
from vmruntime.errors import InvalidArgument
from vmruntime.model.sandbox import Bandwidth

INGRESS, EGRESS = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1000", 1000),
        ("1k", 1000),
        ("10M", 10_000_000),
        (" 10M ", 10_000_000),
        ("1.5M", 1_500_000),
        ("1.M", 1_000_000),
        ("1Ki", 1024),
        ("1Gi", 2**30),
        ("1e6", 1_000_000),
        ("2E3", 2000),
        ("1P", 10**15),
        ("1000000m", 1000),
        ("1000.0001", 1001),
        ("0.001G", 1_000_000),
    ],
)
def test_quantities(text: str, rate: int) -> None:
    assert bandwidth_from_annotations({EGRESS: text}) == Bandwidth(egress=rate)
    assert bandwidth_from_annotations({INGRESS: text, EGRESS: "1G"}) == Bandwidth(ingress=rate, egress=10**9)


def test_none() -> None:
    assert bandwidth_from_annotations({"kubernetes.io/other": "x"}) == Bandwidth()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a quantity"),
        ("fast", "is not a quantity"),
        ("10 M", "is not a quantity"),
        ("-1M", "is not a quantity"),
        ("10MB", "is not a quantity"),
        ("10K", "is not a quantity"),
        ("1e9999", "is not a quantity"),
        ("1Mi1", "is not a quantity"),
        ("٣M", "is not a quantity"),
        ("9" * 1000, "is not a quantity"),
        ("0", "is not from 1k to 1P"),
        ("999", "is not from 1k to 1P"),
        ("1E", "is not from 1k to 1P"),
        ("1e-999", "is not from 1k to 1P"),
        ("1e999", "is not from 1k to 1P"),
    ],
)
def test_complaints_name_the_annotation(text: str, why: str) -> None:
    for annotation in (INGRESS, EGRESS):
        with pytest.raises(InvalidArgument) as caught:
            bandwidth_from_annotations({annotation: text})
        assert caught.value.message.startswith(f"annotation {annotation}: ")
        assert why in caught.value.message
