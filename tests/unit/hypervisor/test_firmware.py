"""Where UEFI firmware is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.firmware import OVMF, find_ovmf


def install(root: Path, *paths: str) -> None:
    for path in paths:
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


@pytest.mark.parametrize("machine", OVMF)
def test_each_place_is_known_and_the_first_wins(machine: str, tmp_path: Path) -> None:
    for pair in reversed(OVMF[machine]):
        install(tmp_path, *pair)
        code, variables = find_ovmf(machine, tmp_path)
        assert [f"/{path.relative_to(tmp_path)}" for path in (code, variables)] == list(pair)


def test_code_and_variables_of_different_builds_do_not_go_together(tmp_path: Path) -> None:
    install(tmp_path, OVMF["x86_64"][0][0], OVMF["x86_64"][1][1])
    with pytest.raises(FailedPrecondition, match="no OVMF for x86_64") as raised:
        find_ovmf("x86_64", tmp_path)
    assert "ovmf" in raised.value.remedy


def test_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no OVMF for riscv64"):
        find_ovmf("riscv64", tmp_path)
