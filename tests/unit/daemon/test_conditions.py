"""What Status says of user namespaces."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vmruntime.daemon.conditions
from vmruntime.config.settings import GuestSettings, Settings
from vmruntime.daemon.conditions import DaemonConditions
from vmruntime.model.sandbox import SandboxKind


def conditions(directory: Path) -> DaemonConditions:
    nothing: Any = None
    return DaemonConditions(Settings(guest=GuestSettings(directory=str(directory))), nothing, nothing)


@pytest.mark.parametrize(
    ("host", "guest", "limit", "container", "on_host"),
    [
        ("6.1.0-18-amd64", "6.1.192-vmruntime", 100, True, True),
        ("5.15.0-1-generic", "6.1.192", 100, True, False),
        ("5.10.0", "6.1.192", 100, False, False),
        ("6.1.0", "5.15.1", 0, False, False),
        ("6.1.0", "nonsense", 100, False, True),
    ],
)
def test_user_namespaces_need_kernels_that_can(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    host: str,
    guest: str,
    limit: int,
    container: bool,
    on_host: bool,
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=host))
    monkeypatch.setattr(vmruntime.daemon.conditions, "_host_limit", lambda: limit)
    (tmp_path / "guest.json").write_text(json.dumps({"schema": 1, "kernel_release": guest}))
    found = conditions(tmp_path)
    assert found.user_namespaces(SandboxKind.CONTAINER) is container
    assert found.user_namespaces(SandboxKind.HOST) is on_host
    assert not found.user_namespaces(SandboxKind.IMAGE)


def test_a_missing_guest_can_nothing(tmp_path: Path) -> None:
    assert not conditions(tmp_path).user_namespaces(SandboxKind.CONTAINER)
