"""Limits of a pod's traffic, as Kubernetes' annotations ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING

from vmruntime.cri.translate.checks import bad
from vmruntime.model.quantity import parse
from vmruntime.model.sandbox import Bandwidth

INGRESS_ANNOTATION = "kubernetes.io/ingress-bandwidth"
EGRESS_ANNOTATION = "kubernetes.io/egress-bandwidth"

LEAST, MOST = 1000, 10**15
"""Bits per second that Kubernetes lets an annotation ask for: 1k to 1P."""


def bandwidth_from_annotations(annotations: Mapping[str, str]) -> Bandwidth:
    """Return the limits that annotations ask for.

    Raises:
        InvalidArgument: One is not a quantity, or unreasonably small or large.
    """
    return Bandwidth(
        ingress=_limit(INGRESS_ANNOTATION, annotations.get(INGRESS_ANNOTATION)),
        egress=_limit(EGRESS_ANNOTATION, annotations.get(EGRESS_ANNOTATION)),
    )


def _limit(annotation: str, value: str | None) -> int:
    if value is None:
        return 0
    name = f"annotation {annotation}"
    text = value.strip()
    number = parse(text) if text[:1].isdigit() else None  # no sign, and no point first
    if number is None:
        raise bad(name, value, "is not a quantity", remedy="bits per second, such as 10M")
    rate = number.to_integral_value(ROUND_CEILING)
    if not LEAST <= rate <= MOST:
        raise bad(name, value, "is not from 1k to 1P", remedy="bits per second, such as 10M")
    return int(rate)
