"""Limits of a pod's traffic, as Kubernetes' annotations ask for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal

from vmruntime.cri.translate.checks import bad
from vmruntime.model.sandbox import Bandwidth

INGRESS_ANNOTATION = "kubernetes.io/ingress-bandwidth"
EGRESS_ANNOTATION = "kubernetes.io/egress-bandwidth"

LEAST, MOST = 1000, 10**15
"""Bits per second that Kubernetes lets an annotation ask for: 1k to 1P."""

_QUANTITY = re.compile(r"([0-9]{1,20}(?:\.[0-9]{0,20})?)(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?[0-9]{1,3}))?")
_FACTORS = {
    **{letter: Decimal(1000) ** power for power, letter in enumerate(("", "k", "M", "G", "T", "P", "E"))},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
    **{letter: Decimal(1000) ** -power for power, letter in enumerate("mun", 1)},
}


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
    found = _QUANTITY.fullmatch(value.strip())
    if found is None:
        raise bad(name, value, "is not a quantity", remedy="bits per second, such as 10M")
    number, suffix, exponent = found.groups()
    factor = Decimal(10) ** int(exponent) if exponent else _FACTORS[suffix or ""]
    rate = (Decimal(number) * factor).to_integral_value(ROUND_CEILING)
    if not LEAST <= rate <= MOST:
        raise bad(name, value, "is not from 1k to 1P", remedy="bits per second, such as 10M")
    return int(rate)
