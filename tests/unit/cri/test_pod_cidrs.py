"""What kubelet tells of the node's pod CIDRs."""

from __future__ import annotations

import pytest

from vmruntime.cri.translate.pod_cidrs import pod_cidrs_from_cri
from vmruntime.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "cidrs"),
    [
        ("", []),
        ("  ", []),
        ("10.244.1.0/24", ["10.244.1.0/24"]),
        ("10.244.1.7/24", ["10.244.1.0/24"]),
        ("10.244.1.0/24,fd00:1::/64", ["10.244.1.0/24", "fd00:1::/64"]),
        (" fd00:1:0::/64 , 10.244.1.0/24 ", ["fd00:1::/64", "10.244.1.0/24"]),
        ("10.1.0.0/24,10.2.0.0/24", ["10.1.0.0/24", "10.2.0.0/24"]),
    ],
)
def test_understood(text: str, cidrs: list[str]) -> None:
    assert pod_cidrs_from_cri(text) == cidrs


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense", "'nonsense' in it, which is not a CIDR"),
        ("10.244.1.0", "'10.244.1.0' in it, which is not a CIDR"),
        ("10.244.1.0/33", "is not a CIDR"),
        ("10.244.1.0/24,", "'' in it, which is not a CIDR"),
        ("fe80::%1/64", "is not a CIDR"),
        ("0.0.0.0/0", "cannot be a network of pods"),
        ("224.0.0.0/8", "cannot be a network of pods"),
        ("127.0.0.0/8", "cannot be a network of pods"),
        ("fe80::/64", "cannot be a network of pods"),
        ("10.0.0.0/8,fd00::/64,10.1.0.0/16", "two networks that overlap: 10.0.0.0/8 and 10.1.0.0/16"),
        (",".join(f"10.{number}.0.0/16" for number in range(17)), "17 entries"),
    ],
)
def test_complaints(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        pod_cidrs_from_cri(text)
    assert caught.value.message.startswith("runtime_config.network_config.pod_cidr: ")
    assert why in caught.value.message
