"""When a daemon is said to be ready for a measure of starts."""

from __future__ import annotations

import json
import tomllib
import types
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import bed
from bench.bed import Node, Source
from vmruntime.config.settings import Settings


def node(source: Source, *answers: dict[str, Any]) -> tuple[Node, list[dict[str, Any]]]:
    """Return a node whose Status gives some answers, the last one again and again, and those not given yet."""
    left = list(answers)

    def status(request: Any) -> Any:
        one = left.pop(0) if len(left) > 1 else left[0]
        return types.SimpleNamespace(info={"start": json.dumps(one)} if one else {})

    made = Node.__new__(Node)
    made.source = source
    made.runtime = types.SimpleNamespace(Status=status)
    return made, left


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(bed, "QUIET_SECONDS", 0.05)


BUILDING = {"templates": {"512": "building"}, "warm": 0}
READY = {"templates": {"512": "ready"}, "warm": 0}
ONE = {"templates": {"512": "ready"}, "warm": 1}
TWO = {"templates": {"512": "ready"}, "warm": 2}
FAILED = {"templates": {"512": "failed: no room"}, "warm": 0}
NOTHING: dict[str, Any] = {"templates": {}, "warm": 0}


@pytest.mark.parametrize(
    ("source", "answers"),
    [
        ("template", (BUILDING, READY)),
        ("warm", (BUILDING, READY, ONE, TWO)),
        ("auto", (BUILDING, READY, ONE)),
        ("auto", (BUILDING, FAILED)),
        ("template", (NOTHING, READY)),
    ],
)
def test_a_daemon_is_waited_for(source: Source, answers: tuple[dict[str, Any], ...]) -> None:
    one, left = node(source, *answers)
    one.settle()
    assert left == [answers[-1]]


@pytest.mark.parametrize(
    ("source", "answer"), [("template", BUILDING), ("template", FAILED), ("warm", ONE), ("auto", BUILDING)]
)
def test_a_daemon_that_does_not_get_ready_is_told_of(source: Source, answer: dict[str, Any]) -> None:
    one, _ = node(source, answer)
    with pytest.raises(TimeoutError, match=f"{source}.*{answer['templates']['512']}"):
        one.settle()


@pytest.mark.parametrize("source", ["cold", "auto"])
def test_a_daemon_without_templates_is_ready(source: Source) -> None:
    node(source, {})[0].settle()


def test_sources_differ_in_nothing_but_the_start_table() -> None:
    tables = {name: text.splitlines()[:1] for name, text in bed._START.items()}
    assert tables == {"auto": ["[start]"], "cold": ["[start]"], "template": ["[start]"], "warm": ["[start]"]}


def test_the_daemon_takes_the_start_tables() -> None:
    for text in bed._START.values():
        msgspec.convert(tomllib.loads(text), Settings)


def test_the_guest_has_a_release(tmp_path: Path) -> None:
    one = bed.Bed.__new__(bed.Bed)
    one.guest = tmp_path
    assert one.guest_kernel == "unknown"
    (tmp_path / "guest.json").write_text('{"kernel_release": "6.1"}')
    assert one.guest_kernel == "6.1"
