"""docs/cri.md names every call, and says of the right ones that they are not built."""

from __future__ import annotations

import re
from pathlib import Path

from vmruntime.cri.not_built import NotBuilt
from vmruntime.generated import cri_pb2

DOCUMENT = Path(__file__).parents[3] / "docs/cri.md"


def test_every_call_is_listed_once() -> None:
    rows = re.findall(
        r"^\| (`.*?) \| (works|not built) \|", DOCUMENT.read_text().partition("## Fields")[0], re.MULTILINE
    )
    listed = [(name, state) for names, state in rows for name in re.findall(r"`(\w+)`", names)]
    services = cri_pb2.DESCRIPTOR.services_by_name.values()
    assert sorted(name for name, _ in listed) == sorted(method.name for one in services for method in one.methods)
    assert {name for name, state in listed if state == "not built"} == {
        name for name in vars(NotBuilt) if name[0].isupper()
    }
